"""Names of the hub: a stand-in server answers as the real one does, and the real clients ask it, in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from train.data import DataError, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_averysecrettokenindeed"
NOBODY = "http://127.0.0.1:9"  # the discard port, on which nobody listens
CORPUS = "".join(json.dumps({"text": f"row {i} " + "abc " * 20}) + "\n" for i in range(40))


class Hub(BaseHTTPRequestHandler):
    """One open dataset, one that is gated; whatever else is asked for does not exist."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if "/gated" in self.path:
            self.answer(403, {"error": "Access to dataset org/gated is restricted."}, {"X-Error-Code": "GatedRepo"})
        elif self.path.startswith("/api/datasets/org/open/revision/v9"):
            self.answer(404, {"error": "Invalid rev id: v9"}, {"X-Error-Code": "RevisionNotFound"})
        elif self.path.startswith("/api/datasets/org/open"):
            files = [{"rfilename": "data.jsonl", "type": "file", "path": "data.jsonl", "size": len(CORPUS), "oid": "x"}]
            tree = "/tree/" in self.path or "/paths-info/" in self.path
            self.answer(200, files if tree else {"id": "org/open", "sha": COMMIT, "siblings": files, "tags": []})
        elif self.path.startswith(f"/datasets/org/open/resolve/{COMMIT}/data.jsonl"):
            self.answer(200, CORPUS, {"ETag": '"abc"', "X-Repo-Commit": COMMIT})
        elif "/org/open/" in self.path:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def answer(self, code: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


PREPARE = """
import json, sys
from train import data
from train.config import Config
for case in json.loads(sys.argv[1]):
    cfg = Config()
    cfg.data.tokenizer = "bytes"
    cfg.data.seq_len = 64
    for name, value in case.items():
        group, field = name.split(".")
        setattr(getattr(cfg, group), field, value)
    try:
        prepared = data.prepare(cfg)
        print(json.dumps([prepared.fingerprints, prepared.info["train_samples"], prepared.info["rows"]]))
    except data.DataError as error:
        print("DataError:", error)
"""


def prepare(tmp_path: Path, endpoint: str, *cases: dict[str, str], **env: str) -> list[str]:
    """The lines that are printed while preparing in a new process, with a token in its environment."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.endswith(("_OFFLINE", "_proxy", "_PROXY"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps([{"data.cache_dir": str(tmp_path / "cache"), **c} for c in cases])],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**inherited, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": SECRET, **env},
    )
    assert SECRET not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dataset_of_the_hub_is_fetched_once_and_pinned(tmp_path: Path, endpoint: str) -> None:
    first = prepare(tmp_path, endpoint, {"data.path": "org/open"})
    assert first[0].startswith(f"org/open: main is commit {COMMIT} from now on")
    fingerprints, samples, rows = json.loads(first[-1])
    assert rows == 40
    assert samples[0] > 20
    asked = len(Hub.asked)
    again = prepare(tmp_path, NOBODY, {"data.path": "org/open"}, HF_HUB_OFFLINE="1")
    assert json.loads(again[-1])[0] == fingerprints
    assert len(Hub.asked) == asked


def test_gated_and_missing_names_say_what_to_do(tmp_path: Path, endpoint: str) -> None:
    gated, missing, model, revision = prepare(
        tmp_path,
        endpoint,
        {"data.path": "org/gated"},
        {"data.path": "org/none"},
        {"data.path": "stdlib", "data.tokenizer": "org/none"},
        {"data.path": "org/open@v9"},
    )
    assert "The dataset org/gated is gated: accept its licence at https://huggingface.co/datasets/org/gated" in gated
    assert "hf auth login" in gated
    assert "HF_TOKEN" in gated
    assert "org/none is neither a file or directory here nor a dataset on the hub that you may see" in missing
    assert "nor a model on the hub" in model
    assert "has no revision 'v9'" in revision


def test_without_a_network_it_says_so(tmp_path: Path, endpoint: str) -> None:
    (unreached,) = prepare(tmp_path, NOBODY, {"data.path": "stdlib", "data.tokenizer": "org/other"})
    assert "The model org/other is not on this machine, and the hub was not reached" in unreached
    (offline,) = prepare(tmp_path, endpoint, {"data.path": "org/other"}, HF_HUB_OFFLINE="1")
    assert "not asked, as HF_HUB_OFFLINE is set" in offline
    assert "If org/other should be a path: there is no such file" in offline


def test_names(tmp_path: Path) -> None:
    assert hub.parse("org/name") == ("org/name", None)
    assert hub.parse("org/name@refs/convert/parquet") == ("org/name", "refs/convert/parquet")
    assert hub.parse("name@v1.0") == ("name", "v1.0")
    for path in ("/org/name", "a/b/c", "./name", "~/name", "org/name/", "", "a b"):
        assert hub.parse(path) is None
    assert hub.commit("dataset", "org/name", COMMIT, tmp_path, print) == COMMIT  # asks nobody


def test_unknown_errors_are_told_without_secrets() -> None:
    error = hub.explain(RuntimeError(f"403 for Bearer abc.def with {SECRET}\nand more"), "model", "org/name")
    assert isinstance(error, DataError)
    assert str(error) == "The model org/name cannot be loaded: RuntimeError: 403 for Bearer *** with ***"
    scripts = hub.explain(
        RuntimeError("Dataset scripts are no longer supported, but found x.py"), "dataset", "org/name"
    )
    assert "never run here" in str(scripts)
    assert "licence" not in str(hub.explain(RuntimeError("aggregated"), "dataset", "org/name"))
