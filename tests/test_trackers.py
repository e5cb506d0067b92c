"""The trackers: real W&B, TensorBoard and MLflow, and ones that refuse, hang or lie."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from train import trackers
from train.config import Config
from train.rundir import RunDir, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
HASHES = {"math_hash": "a" * 64, "exec_hash": "b" * 64}


def config(*names: str, mode: str = "offline") -> Config:
    cfg = Config()
    for name in names:
        setattr(cfg.tracker, name, True)
    cfg.tracker.mode = mode
    return cfg


def row(step: int, **changes: object) -> dict:
    return {"step": step, "attempt": 1, "loss": 1.0 / step, "loss_hex": (1.0 / step).hex(), "lr": 1e-3,
            "grad_norm": None, "tokens_per_s": 1000.0, **changes}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "tiny-1").create()


@pytest.fixture
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No account, no settings of the machine's user; returns the home directory."""
    home = tmp_path / "home"
    home.mkdir()
    for key in [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(key)
    for key in ("HOME", "XDG_CONFIG_HOME", "NETRC"):
        monkeypatch.setenv(key, str(home))
    return home


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "train.trackers"]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    for _ in range(100):
        if not living():
            return
        time.sleep(0.1)
    pytest.fail(f"left behind: {living()}")


def living() -> list[str]:
    """Command lines of the processes of trackers, W&B's own included, that carry this session's mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            marked = f"GEARSHIFT_TEST={os.getpid()}".encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if marked and ("train.trackers" in command or "wandb-core" in command or "wandb-symon" in command):
            found.append(command)
    return found


@pytest.fixture(autouse=True)
def mark_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEARSHIFT_TEST", str(os.getpid()))


def track(cfg: Config, run: RunDir, attempt: int = 1, steps: range = range(1, 21), status: str = "finished") -> float:
    """A short life of a run; returns the seconds that closing took."""
    tracker = trackers.open(cfg, run, attempt, HASHES, active=True)
    for step in steps:
        tracker.log(row(step, **({"eval_loss": 0.5} if step == 20 else {})))
    began = time.monotonic()
    tracker.close({"status": status, "objective": 0.5})
    return time.monotonic() - began


# ----------------------------------------------------------------------------------------------------------------- W&B


def wandb_records(directory: Path) -> list:
    """The records of an offline run: LevelDB's log format, behind seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.glob("*.wandb")
    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's unused end
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def items(update: object) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}  # type: ignore[attr-defined]


@pytest.mark.usefixtures("clean_environment")
def test_wandb_offline_has_a_run_for_each_attempt_in_one_group(run: RunDir, warned) -> None:
    for attempt, steps, status in ((1, range(1, 16), "stopped"), (2, range(16, 21), "finished")):
        assert track(config("wandb"), run, attempt, steps, status) < 20
    assert warned() == []
    directories = sorted(run.path.glob("wandb/offline-run-*"))
    assert len(directories) == 2
    (identity,) = [event["id"] for event in read_jsonl(run.events)]
    assert identity.startswith("tiny-1-")
    seen: list[int] = []
    for attempt, directory in enumerate(directories, 1):
        by_kind: dict[str, list] = {}
        for record in wandb_records(directory):
            by_kind.setdefault(record.WhichOneof("record_type"), []).append(record)
        started = by_kind["run"][0].run
        assert directory.name.endswith(f"{identity}-a{attempt}")
        assert (started.run_id, started.run_group, started.project) == (f"{identity}-a{attempt}", "tiny-1", "gearshift")
        written = items(started.config.update)
        assert {key: written[key] for key in HASHES} == HASHES
        assert written["optim"]["lr"] == Config().optim.lr
        assert any((m.metric.glob_name, m.metric.step_metric) == ("*", "step") for m in by_kind["metric"])
        rows = [items(record.history.item) for record in by_kind["history"]]
        seen += [found["step"] for found in rows]
        assert all(found["loss"] == 1 / found["step"] for found in rows)
        assert not {"loss_hex", "attempt", "grad_norm"} & rows[0].keys()
        assert by_kind["exit"][0].exit.exit_code == 0
    assert seen == list(range(1, 21))
    assert rows[-1]["eval_loss"] == 0.5


@pytest.fixture
def silent_server() -> Iterator[tuple[str, list]]:
    """Takes connections and never says a word. (its address, who came)"""
    came: list = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def take() -> None:
            while True:
                try:
                    came.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", came
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "SILENCE_S", 3.0)
    monkeypatch.setattr(trackers, "LAST_CHANCE_S", 1.0)


@pytest.mark.usefixtures("clean_environment", "impatient")
def test_offline_asks_no_server_and_an_online_one_that_is_mute_costs_little(
    run: RunDir, silent_server: tuple[str, list], warned, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, came = silent_server
    for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    trackers.SILENCE_S = 15.0
    track(config("wandb"), run)
    assert (came, warned()) == ([], [])
    trackers.SILENCE_S = 3.0

    tracker = trackers.open(config("wandb", mode="online"), run, 2, HASHES, active=True)
    tracker.log(row(1))
    for _ in range(300):
        if came:
            break
        time.sleep(0.1)
    assert came, "the control: this is where a connection would have been seen"
    began = time.monotonic()
    tracker.close({"status": "finished"})
    assert time.monotonic() - began < 5
    (warning,) = warned()
    assert warning.startswith("W&B did not finish and was ended")
    assert "0123456789" not in warning + (run.logs / "wandb.log").read_text()


@pytest.mark.usefixtures("clean_environment")
def test_online_without_a_key_is_refused_with_one_warning_and_no_question(run: RunDir, warned) -> None:
    assert track(config("wandb", mode="online"), run) < 20
    (warning,) = warned()
    assert "W&B refused to start" in warning
    assert "wandb login" in warning
    assert str(run.logs / "wandb.log") in warning
    assert "UsageError" in (run.logs / "wandb.log").read_text()


def test_the_identity_moves_with_the_run_and_belongs_to_it_alone(run: RunDir, tmp_path: Path) -> None:
    first = trackers._identity(run, 1)
    copy, other = RunDir(tmp_path / "elsewhere" / "tiny-1"), RunDir(tmp_path / "other" / "tiny-1")
    copy.path.mkdir(parents=True)
    other.path.mkdir(parents=True)
    shutil.copy(run.events, copy.events)
    assert trackers._identity(copy, 2) == first
    assert trackers._identity(other, 1) != first


# --------------------------------------------------------------------------------------------- TensorBoard and MLflow


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.skipif(not find_spec("tensorboard"), reason="the extra `tensorboard` is not installed")
def test_tensorboard_reads_it_back_and_a_resume_replaces_what_it_repeats(run: RunDir, warned) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(config("tensorboard"), run, 1, range(1, 16))
    time.sleep(1.1)  # event files are ordered by the second in their names
    track(config("tensorboard"), run, 2, range(11, 21))
    assert warned() == []
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 21))
    assert events.Scalars("loss")[3].value == 0.25
    assert [event.step for event in events.Scalars("eval_loss")] == [20]
    assert "loss_hex" not in events.Tags()["scalars"]


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.skipif(not find_spec("mlflow"), reason="the extra `mlflow` is not installed")
def test_mlflow_has_one_run_for_life(run: RunDir, warned) -> None:
    for attempt, steps, status in ((1, range(1, 16), "stopped"), (2, range(16, 21), "finished")):
        track(config("mlflow"), run, attempt, steps, status)
    assert warned() == []
    (metric,) = run.path.parent.glob("mlruns/*/*/metrics/loss")
    lines = [line.split() for line in metric.read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step in lines] == [(1 / s, s) for s in range(1, 21)]
    assert (metric.parent.parent / "params" / "optim.lr").read_text() == "0.0003"
    tags = {file.name: file.read_text() for file in (metric.parent.parent / "tags").iterdir()}
    assert (tags["attempt"], tags["status"], tags["math_hash"]) == ("2", "finished", HASHES["math_hash"])


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a module before the real one, for the tracker's process."""

    def put(init: str, log: str = "pass", finish: str = "pass") -> None:
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "wandb.py").write_text(
            "import os, time\n"
            "class Settings:\n    def __init__(self, **_): pass\n"
            f"class Run:\n    summary = {{}}\n    def define_metric(self, *_, **__): pass\n"
            f"    def log(self, row): {log}\n    def finish(self, exit_code): {finish}\n"
            f"def init(**_):\n    {init}\n    return Run()\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return put


@pytest.mark.usefixtures("impatient")
def test_a_tracker_that_hangs_costs_one_warning_and_a_bounded_wait(run: RunDir, fake_wandb, warned) -> None:
    fake_wandb("time.sleep(1000)")
    assert track(config("wandb"), run) < 5
    (warning,) = warned()
    assert "W&B did not finish and was ended; it may lack the last 21 rows. metrics.jsonl has every step" in warning

    tracker = trackers.open(config("wandb"), run, 1, HASHES, active=True)
    tracker.log(row(1))
    time.sleep(3.5)  # it has been mute for too long already when the run ends
    began = time.monotonic()
    tracker.close({})
    assert time.monotonic() - began < 2


@pytest.mark.usefixtures("impatient")
def test_a_tracker_that_hangs_never_holds_up_the_run(run: RunDir, fake_wandb, warned, monkeypatch) -> None:
    fake_wandb("time.sleep(1000)")
    monkeypatch.setattr(trackers, "QUEUED_ROWS", 100)
    tracker = trackers.open(config("wandb"), run, 1, HASHES, active=True)
    began = time.monotonic()
    for step in range(1, 20_001):  # more than queue and pipe take
        tracker.log(row(step))
    assert time.monotonic() - began < 3
    assert len(warned()) == 1
    assert "W&B does not keep up and misses rows" in warned()[0]
    tracker.close({})
    assert len(warned()) == 1


def test_a_tracker_that_raises_costs_one_warning_and_no_key_is_shown(
    run: RunDir, fake_wandb, warned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "swordfish-swordfish")
    fake_wandb("pass", log="raise RuntimeError('bad key swordfish-swordfish.')")
    assert track(config("wandb"), run) < 10
    (warning,) = warned()
    assert "W&B failed: bad key ***. metrics.jsonl" in warning
    text = (run.logs / "wandb.log").read_text()
    assert "RuntimeError: bad key ***" in text
    assert "swordfish" not in text.replace("raise RuntimeError('bad key swordfish-swordfish.')", "")


def test_a_tracker_that_dies_or_cannot_start_costs_one_warning(run: RunDir, fake_wandb, warned, monkeypatch) -> None:
    fake_wandb("os._exit(7)")
    assert track(config("wandb"), run) < 10
    assert "W&B ended with exit code 7" in warned()[0]
    monkeypatch.setattr(trackers.sys, "executable", "/no/such/python")
    assert track(config("wandb"), run) < 10
    assert "W&B could not be started" in warned()[1]
    assert len(warned()) == 2


def test_a_tracker_that_is_slow_at_the_end_is_waited_for(run: RunDir, fake_wandb, warned, tmp_path: Path) -> None:
    fake_wandb("pass", finish=f"time.sleep(2), open({str(tmp_path / 'done')!r}, 'w')")
    assert 2 < track(config("wandb"), run) < 10
    assert (tmp_path / "done").exists()
    assert warned() == []


DIES = """
import os, signal, sys, time
from train import trackers
from train.config import Config
from train.rundir import RunDir
trackers.ORPHAN_S = 3.0
cfg = Config()
cfg.tracker.wandb = True
tracker = trackers.open(cfg, RunDir(sys.argv[1]), 1, {"math_hash": "a", "exec_hash": "b"}, active=True)
for step in range(1, 101):
    tracker.log({"step": step, "loss": 1.0})
time.sleep(0.5)
assert not {"wandb", "tensorboard", "torch"} & sys.modules.keys()  # imported elsewhere
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("clean_environment")
def test_when_the_run_is_killed_its_trackers_finish_and_leave(run: RunDir) -> None:
    process = subprocess.run([sys.executable, "-c", DIES, str(run.path)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert living(), "the control: they outlive the run for a moment"
    for _ in range(200):
        if not living():
            break
        time.sleep(0.1)
    assert living() == []
    (directory,) = run.path.glob("wandb/offline-run-*")
    records = wandb_records(directory)
    steps = [items(r.history.item)["step"] for r in records if r.WhichOneof("record_type") == "history"]
    assert steps == list(range(1, 101))
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [1]  # W&B calls it crashed


def test_a_hung_tracker_does_not_outlive_a_killed_run(run: RunDir, fake_wandb, monkeypatch) -> None:
    fake_wandb("time.sleep(1000)")
    process = subprocess.run([sys.executable, "-c", DIES, str(run.path)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert living(), "the control: it lives on for ORPHAN_S"
    for _ in range(300):
        if not living():
            break
        time.sleep(0.1)
    assert living() == []


# ------------------------------------------------------------------------------------------------------ what it costs


def test_without_trackers_or_off_the_main_process_nothing_happens(run: RunDir) -> None:
    threads = threading.active_count()
    trackers.open(config("wandb"), run, 1, HASHES, active=True)  # starts with the first row
    tracker = trackers.open(config("wandb", "tensorboard"), run, 1, HASHES, active=False)
    tracker.log(row(1))
    tracker.close({})
    assert threading.active_count() == threads
    assert not list(run.logs.iterdir())
