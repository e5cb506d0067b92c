"""A model, a kind of data and a task from outside the tree: those of `docs/adding_a_task.md`, taken out of that page."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks

PAGE = (ranks.ROOT / "docs" / "adding_a_task.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of the page, and points to learn from: y = sin(x)."""
    import math

    place = tmp_path_factory.mktemp("plugin")
    for name, text in re.findall(r"```\w+ file=(\S+)\n(.*?)```", PAGE, re.DOTALL):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    points = (f"{x / 50:.2f},{math.sin(x / 50):.4f}\n" for x in range(-150, 150))
    (place / "points.csv").write_text("x,y\n" + "".join(points))
    return place


def gearshift(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ranks.ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=place, env=env, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def command() -> list[str]:
    """The command of the page."""
    (line,) = re.findall(r"```bash run\n(.*?)```", PAGE, re.DOTALL)
    name, *words = shlex.split(line)
    assert name == "gearshift"
    return [*words, "tracker=none"]


@pytest.fixture(scope="module")
def run(place: Path, command: list[str]) -> Path:
    """The run that the command of the page makes."""
    done = gearshift(place, *command)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "curve"


@pytest.mark.pulse
def test_it_trains(run: Path) -> None:
    result, rows = ranks.result(run), ranks.metrics(run)
    assert (result["status"], result["metric"], len(rows)) == ("finished", "eval_mse", 60)
    first, last = (row["eval_mse"] for row in rows if "eval_mse" in row)
    assert last < first
    assert result["objective"] == last < 0.25  # without x, the best is the variance of y, 0.5
    curve = (run / "samples" / "step-00000060" / "curve.txt").read_text().splitlines()
    assert len(curve) == 7


@pytest.mark.pulse
def test_its_source_is_part_of_what_is_learned(place: Path, run: Path, command: list[str]) -> None:
    same = gearshift(place, *command)
    assert same.returncode == 0
    assert "curve: finished" in same.stdout
    task = place / "curves" / "task.py"
    former = task.read_text()
    task.write_text(former + "# changed\n")
    changed = gearshift(place, *command)
    task.write_text(former)
    assert changed.returncode == 2
    assert "plugins" in changed.stderr


@pytest.mark.pulse
def test_without_it_the_run_is_refused(place: Path, run: Path) -> None:
    refused = gearshift(place, "predict", str(run), "--to", "out")
    assert refused.returncode == 2
    assert "--plugin" in refused.stderr


@pytest.mark.pulse
def test_predict_and_export(place: Path, run: Path) -> None:
    found = gearshift(place, "predict", str(run), "--to", "predicted", "--plugin", "curves")
    assert found.returncode == 0, found.stderr
    said = json.loads((place / "predicted" / "metrics.json").read_text())
    assert said["eval_mse"] == pytest.approx(ranks.result(run)["objective"], rel=1e-6)
    assert len((place / "predicted" / "predicted.txt").read_text().splitlines()) == 30
    exported = gearshift(place, "export", str(run), "--to", "exported", "--plugin", "curves")
    assert exported.returncode == 0, exported.stderr
    receipt = json.loads((place / "exported" / "export.json").read_text())
    assert (receipt["form"], receipt["max_difference"]) == ("gearshift", 0.0)


@pytest.mark.ranks
def test_two_processes_agree_and_a_batch_that_does_not_divide_is_finite(place: Path, run: Path) -> None:
    """The two cheap tests that the page names, under sharding too."""
    common = [
        *("task.name=regress", "model.name=mlp", "model.hidden_size=32", "data.kind=points", "optim.lr=0.01"),
        *(f"data.path={place}/points.csv", "train.max_steps=5", "hardware=cpu", "tracker=none", "log.every=1"),
        *("train.global_batch_size=7", "train.precision=fp32", "strategy.micro_batch_size=2", f"run.root={place}/more"),
    ]
    setup = f"import sys; sys.path.insert(0, {str(place)!r})\nimport os; os.environ['GEARSHIFT_PLUGIN'] = 'curves'\n"
    ranks.run_jobs(1, [[*common, "run.name=one", "strategy=single"]], setup=setup)
    ranks.run_jobs(2, [[*common, f"run.name={s}", f"strategy={s}"] for s in ("ddp", "fsdp2")], setup=setup)
    one = ranks.metrics(place / "more" / "one")
    for name in ("ddp", "fsdp2"):
        for row, wanted in zip(ranks.metrics(place / "more" / name), one, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
