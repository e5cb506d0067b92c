"""A checkpoint resumes anywhere: a covering sample of `benchmarks/resume.py`, and all of it as a slow test."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from benchmarks import resume
from tests import ranks
from train import checkpoint, rundir
from train.rundir import RunDir

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> resume.Lab:
    lab = resume.Lab(tmp_path_factory.mktemp("resume"))
    lab.run(resume.sample())
    return lab


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.name) for cell in resume.sample() if not cell.way],
)
def test_a_sample_of_layouts_saves_loads_and_goes_on(lab: resume.Lab, cell: resume.Cell) -> None:
    assert lab.row(cell)["problem"] == ""


def test_weights_that_are_not_rebuilt_are_seen(lab: resume.Lab) -> None:
    (control,) = (cell for cell in resume.sample() if cell.way)
    assert "computes in torch.float32 with other weights" in lab.row(control)["problem"]


CLOCK = """
import time
from train import lifecycle, stop
prepare, mark = lifecycle.prepare, stop.Watchdog.mark
def prepared(cfg, procs):
    lifecycle.began = time.perf_counter()
    return prepare(cfg, procs)
def marked(self, step, doing):
    mark(self, step, doing)
    if doing == "forward" and lifecycle.began is not None:
        lifecycle._opened.run.event("clock", s=time.perf_counter() - lifecycle.began)
        lifecycle.began = None
lifecycle.prepare, stop.Watchdog.mark = prepared, marked
"""


@pytest.mark.slow
def test_going_on_late_takes_no_longer_than_early(tmp_path: Path) -> None:
    """From the first look at the data to the first forward pass, after 3 steps and after 100,003; without torch's import."""
    lab = resume.Lab(tmp_path / "lab")
    what = [*lab.overrides(resume.Cell("lm", "single", 1)), "train.max_steps=200000", "checkpoint.every=null"]
    ranks.run_jobs(1, [[*what, "run.name=source", "run.stop_at=3"]])
    source, late = RunDir(lab.root / "runs" / "source"), 100_003
    jobs = []
    for i in range(5):
        for name, step in (("early", 3), ("late", late)):
            copy = RunDir(shutil.copytree(source.path, source.path.parent / f"{name}-{i}"))
            if name == "late":
                saved = copy.checkpoint(3).rename(copy.checkpoint(late)) / "manifest.json"
                manifest = {**json.loads(saved.read_bytes()), "step": late}
                saved.write_text(json.dumps({**manifest, "manifest_sha256": checkpoint._manifest_hash(manifest)}))
                for file in (copy.metrics, copy.ledger):
                    last = json.loads(file.read_text().splitlines()[-1])
                    with file.open("a") as lines:
                        lines.writelines(json.dumps({**last, "step": at}) + "\n" for at in range(4, late + 1))
            jobs.append([*what, f"run.name={copy.path.name}", f"run.stop_at={step + 1}"])
    ranks.run_jobs(1, [jobs[0], *jobs], setup=CLOCK, check=False)  # the first warms up
    seconds: dict[str, list[float]] = {"early": [], "late": []}
    for job in jobs[2:]:
        name = job[-2].partition("=")[2]
        copy = RunDir(source.path.parent / name)
        assert rundir.committed(copy)[-1] == (late + 1 if "late" in name else 4)
        events = [json.loads(line) for line in copy.events.read_text().splitlines()]
        seconds[name.partition("-")[0]].append(next(e["s"] for e in events if e["kind"] == "clock"))
    assert statistics.median(seconds["late"]) <= 1.05 * statistics.median(seconds["early"]), seconds


@pytest.mark.slow
def test_every_layout_saves_loads_and_goes_on(tmp_path: Path) -> None:
    lab = resume.Lab(tmp_path / "lab")
    lab.run(resume.cells())
    assert [row for row in map(lab.row, resume.cells()) if row["problem"]] == []
    assert sum(cell.source is not None for cell in resume.cells()) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("numerics", resume.CHAINS)
def test_a_chain_of_sizes_with_kills_ends_where_the_unbroken_run_does(tmp_path: Path, numerics: str) -> None:
    found = resume.chain(resume.Lab(tmp_path / "lab"), numerics)
    assert found["good"], found
    assert len(found["resumed"]) == found["kills"] == 4
