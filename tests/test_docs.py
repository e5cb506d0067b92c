"""Everything that the README and the pages of `docs/` tell people to type, and everything that they link to.

A block of ```` ```bash ```` is checked line by line: the verb and its options exist, the overrides compose, the make target
and the file are there. A block of ```` ```bash run ```` is run as it stands, in order, in an empty directory, with a model
and data that are small enough (`TINY`). Blocks with `file=NAME` are files that such a block uses. `text` is output.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from train import config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
PAGES = [page for page in PAGES if page.is_file()]
BIN = Path(sys.executable).parent

TINY = [
    "data.path=text", "data.tokenizer=bytes", "data.seq_len=32", "data.val_fraction=0.3", "model.hidden_size=16",
    "model.num_heads=2", "model.num_layers=1", "model.intermediate_size=32", "train.global_batch_size=4",
    "eval.max_samples=4", "eval.samples=0", "eval.every=null", "tracker=none", "hardware.device=cpu",
]  # fmt: skip
"""What makes a run small; added to the lines that start one, where they do not say otherwise."""

HARMLESS = {"cd", "ls", "source", "touch", "git", "rsync", "tail", "cp", "less", "cat", "kill", "export", "apt-get", "sudo",
            "pre-commit", "scancel", "squeue", "scontrol", "sacct", "vllm", "wandb", "hf", "eval"}  # fmt: skip
"""Commands of others, which only take words of ours."""


@dataclass
class Block:
    page: Path
    line: int
    language: str
    words: list[str]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)

    def commands(self) -> Iterator[list[str]]:
        """Words of each command: lines joined where they end in a backslash, comments left out, split at `&&` and `|`."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            for end in [i for i, word in enumerate(words) if word in ("&&", "|", "&")][::-1]:
                yield words[end + 1 :]
                words = words[:end]
            if words:
                yield words


def blocks(page: Path) -> Iterator[Block]:
    fence: Block | None = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if fence is None:
                language, *words = line[3:].split() or [""]
                fence = Block(page, number, language, words, "")
            else:
                yield fence
                fence = None
        elif fence is not None:
            fence.text += line + "\n"
    assert fence is None, f"{page}: a fence is not closed"


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]


# ------------------------------------------------------------------------------------------------ what a line may say


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of some run, for the lines that go on from one."""
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(config.to_yaml(config.compose(["hardware=cpu"])))
    return path


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if "=" in word and not word.startswith("-")]


def check_train(words: list[str]) -> None:
    """`-m train ...`: options that exist, overrides that compose."""
    from train.__main__ import HELP

    sweep = bool({"-m", "--multirun"} & set(words))
    for word in words:
        if word.startswith("-"):
            assert re.search(rf"(^|[ ,]){re.escape(word.split('=')[0])}\b", HELP, re.MULTILINE), f"no option {word}"
    compose(words, sweep)


def compose(words: list[str], sweep: bool = False) -> None:
    given = overrides(words)
    if sweep:  # one job of it
        given = [re.sub(r"^([^\[]+?=[^,\[]*),.*", r"\1", word) for word in given if not word.startswith("sweep.")]
    extra = [words[words.index("--config-dir") + 1]] if "--config-dir" in words else []
    if extra or "--plugin" in words:  # these pages run their lines
        return
    config.compose(given)


def check_gearshift(words: list[str], frozen: Path) -> None:
    import typer

    from launch import cli

    command = typer.main.get_command(cli.app)
    assert isinstance(command, typer.core.TyperGroup)
    verb = command.get_command(None, words[0])  # type: ignore[arg-type]
    assert verb is not None, f"gearshift has no {words[0]}"
    context = verb.make_context(words[0], words[1:])
    given = context.params
    runs = [Path(str(value)) for name, value in given.items() if name in ("run", "path") and value is not None]
    if words[0] in ("run", "prepare", "plan", "doctor") and not runs:
        compose([*words[1:]], bool(given.get("multirun")))
    elif given.get("overrides"):
        config.load(frozen, given["overrides"])


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    ours = words.index("-m") if "-m" in words else words.index("--module")
    launch_command_parser().parse_args([*words[1:ours], "script"])
    assert words[ours + 1] == "train"
    check_train(words[ours + 2 :])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        if "=" in word:
            assert re.search(rf"^{word.split('=')[0]}\s*\?=", makefile, re.MULTILINE), f"make knows no {word}"
            if word.startswith("ARGS="):
                compose(shlex.split(word.removeprefix("ARGS=")))
        else:
            assert re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), f"make has no target {word}"
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for before, word in itertools.pairwise(words):
        if before in ("-c", "-r"):
            assert (ROOT / word).is_file(), word
        if extras := re.fullmatch(r"(?:\.|gearshift)\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(project["optional-dependencies"]), word


def check_line(words: list[str], frozen: Path) -> None:
    first = words[0].rpartition("/")[2]
    if first == "gearshift":
        check_gearshift(words[1:], frozen)
    elif first in ("python", "python3") and words[1:3] == ["-m", "train"]:
        check_train(words[3:])
    elif first in ("python", "python3"):
        target = words[2] if words[1] == "-m" else words[1]
        known = {"venv", "pip", "pytest"} if words[1] == "-m" else set()
        assert target in known or (ROOT / target).is_file() or (ROOT / f"{target.replace('.', '/')}.py").is_file(), (
            target
        )
    elif first == "accelerate":
        check_accelerate(words[1:])
    elif first == "torchrun":
        check_train(words[words.index("train") + 1 :])
    elif first == "make":
        check_make(words)
    elif first == "pip":
        check_pip(words)
    elif first in ("sbatch", "bash"):
        script = next(word for word in words[1:] if not word.startswith("-"))
        assert (ROOT / script).is_file(), script
        compose(words[words.index(script) + 1 :], sweep=script.endswith("array.sbatch"))
    elif (ROOT / words[0]).is_file():
        assert os.access(ROOT / words[0], os.X_OK), words[0]
    else:
        assert first in HARMLESS, f"{first}: is it ours to promise? Add it to HARMLESS."


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_every_setting_in_yaml_exists(block: Block) -> None:
    found = {re.sub(r"\[.*", "", key) for key, _ in config.items(yaml.safe_load(block.text))}
    assert found <= set(config.leaves(config.Config)), block


def test_no_command_hides_in_another_kind_of_block() -> None:
    ours = re.compile(r"^(gearshift|make|python3?|accelerate|torchrun|sbatch|pip|slurm/\w+) ", re.MULTILINE)
    assert not [str(block) for block in BLOCKS if block.language in ("", "text", "sh") and ours.search(block.text)]


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_command_could_be_typed(block: Block, frozen: Path) -> None:
    for words in block.commands():
        try:
            check_line(words, frozen)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize(
    "line",
    ["gearshift runn optim.lr=1", "gearshift run optim.lrr=1", "gearshift run --fast", "make trian", "make TROCH=x train",
     "python -m train --quick", "accelerate launch --num_procs 2 -m train", "sbatch slurm/trian.sbatch", "frobnicate",
     "gearshift resume runs/a strategy=zero4", "pip install -e .[visoin]", "python benchmarks/nothing.py"],
)  # fmt: skip
def test_a_wrong_command_is_seen(line: str, frozen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((Exception, SystemExit)):
        check_line(shlex.split(line), frozen)


# ------------------------------------------------------------------------------------------------------- what is run


def files_of(page: Path, directory: Path) -> None:
    """The files that a page shows, and what its commands may read."""
    for block in blocks(page):
        if block.file:
            target = directory / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
    (directory / "text").mkdir()
    for number in range(12):
        text = "".join(f"def f{number}_{i}(x):\n    return x * {i} + {number}\n\n\n" for i in range(12))
        (directory / "text" / f"{number}.py").write_text(text)
    points = "".join(f"{x / 50},{math.sin(x / 50)}\n" for x in range(-150, 150))
    (directory / "points.csv").write_text("x,y\n" + points)


RUN = {page: [b for b in SHELL if b.page == page and "run" in b.words] for page in PAGES}


@pytest.mark.pulse
@pytest.mark.parametrize("page", [page for page, found in RUN.items() if found], ids=lambda page: page.name)
def test_the_blocks_that_are_run_work(page: Path, tmp_path: Path) -> None:
    files_of(page, tmp_path)
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    for block in RUN[page]:
        for words in block.commands():
            started = {"run"} & set(words[1:2]) or words[:3] == ["python", "-m", "train"]
            small = TINY if started and "--plugin" not in words else []
            names = {word.partition("=")[0] for word in words}
            words = [*words, *(setting for setting in small if setting.partition("=")[0] not in names)]
            done = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
            )
            expected = 75 if any(word.startswith("run.stop_at=") for word in words) else 0
            assert done.returncode == expected, (
                f"{block}: {shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
            )
    results = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/result.json")]
    assert results
    assert {result["status"] for result in results} == {"finished"}


def test_the_reader_on_the_page_of_the_format_reads_what_we_write(tmp_path: Path) -> None:
    """The page's function, which knows nothing of ours, against our own reader, on files of two writers."""
    import numpy as np

    from train import checkpoint

    block = next(b for b in BLOCKS if b.page.name == "checkpoints.md" and b.language == "python")
    names: dict = {}
    exec(block.text, names)
    rng = np.random.default_rng(0)
    whole = {"a.weight": rng.random((5, 3), np.float32), "b": rng.random(7, np.float32)}
    step = tmp_path / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    cuts = {0: [("a.weight", 0, 8)], 1: [("a.weight", 8, 7), ("b", 0, 7)]}
    order = list(whole)
    receipts = []
    for rank, pieces in cuts.items():
        ranges = [(name, kind, start, count) for kind in ("master", "exp_avg") for name, start, count in pieces]
        flat = np.concatenate([whole[n].reshape(-1)[s : s + c] * (1 if k == "master" else 2) for n, k, s, c in ranges])
        header, table = checkpoint._header(ranges, {n: i for i, n in enumerate(order)})
        receipts.append(checkpoint._write_file(step, rank, header, flat, table))
    manifest = {"format": checkpoint.FORMAT, "step": 4, "counters": {"best_step": None}, "kinds": ["exp_avg", "master"],
                "tensors": [[n, list(v.shape)] for n, v in whole.items()], "aliases": {"c": "b"}, "files": receipts}  # fmt: skip
    manifest["manifest_sha256"] = checkpoint._manifest_hash(manifest)
    (step / "manifest.json").write_text(json.dumps(manifest))

    found = names["read"](step)
    ours = checkpoint.read_masters(tmp_path, "last")
    assert set(found) == set(ours) == {"a.weight", "b", "c"}
    for name, value in found.items():
        assert np.array_equal(value, ours[name].numpy())
        assert np.array_equal(value, whole[name if name != "c" else "b"])
    assert np.array_equal(names["read"](step, "exp_avg")["b"], whole["b"] * 2)
    with open(step / "rank-00001.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x99")
    with pytest.raises(ValueError, match="corrupt"):
        names["read"](step)


# ------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def test_files_that_pages_name_exist() -> None:
    """Paths in backticks that look like files of this tree."""
    lost = []
    for page in PAGES:
        for path in re.findall(
            r"`((?:train|launch|tests|benchmarks|conf|slurm|docs)/[\w./-]+\.\w+)`", page.read_text()
        ):
            if not (ROOT / path).exists() and "conf/local/" not in path:
                lost.append(f"{page.name}: {path}")
        for name in re.findall(r"`(test_\w+\.py)`", page.read_text()):
            if not (ROOT / "tests" / name).exists():
                lost.append(f"{page.name}: {name}")
    assert not lost


def test_verbs_that_pages_name_exist_unless_the_readme_says_not_yet() -> None:
    import typer

    from launch import cli

    verbs = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    readme = (ROOT / "README.md").read_text()
    missing = readme.partition("## Not there yet")[2].partition("\n## ")[0]
    awaited = set(re.findall(r"`gearshift (\w+)", missing))
    named = {verb for page in PAGES for verb in re.findall(r"`gearshift ([a-z]+)", page.read_text())}
    assert named <= verbs | awaited
    assert not awaited & verbs, "they are there by now"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Every module has its line."""
    block = next(b for b in BLOCKS if b.page.name == "README.md" and "tree" in b.words)
    listed: set[str] = set()
    stack: list[tuple[int, str]] = []
    for line in block.text.splitlines():
        found = re.match(r"( *)([\w./-]+)", line)
        if found is None:
            continue
        depth, name = len(found[1]), found[2]
        stack = [(d, n) for d, n in stack if d < depth]
        if name.endswith("/"):
            stack.append((depth, name))
        listed.add("".join(n for _, n in stack) + ("" if name.endswith("/") else name))
    files = {str(f.relative_to(ROOT)) for d in ("train", "launch") for f in (ROOT / d).rglob("*.py")}
    files -= {f for f in files if f.endswith("__init__.py") and f"{Path(f).parent}/" in listed}
    assert not files - listed, "the README's tree lacks these"
    assert not {name for name in listed if not (ROOT / name).exists()}, "the README's tree names what is gone"
