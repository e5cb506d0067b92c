"""Stops that were asked for, ends that nobody asked for, and runs in which nothing moves: each provoked in a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import ranks, trained
from train import checkpoint, ledger, rundir, stop
from train.rundir import RunDir

pytestmark = pytest.mark.timeout(400)

SETUP = """
import os, time
from train import lifecycle, stop
from train.data import loader
from train.tasks import causal_lm
now = {"step": 0, "run": ""}
opened = stop.Stop.__init__
def begin(self, cfg, stop_file, save_file, **words):
    opened(self, cfg, stop_file, save_file, **words)
    now["run"] = cfg.run.name
    if cfg.run.name == "save":
        save_file.touch()
stop.Stop.__init__ = begin
judge = lifecycle.judge
def judged(counters, value, step, *, higher):
    return judge(counters, abs(step - 2.0) if now["run"] == "keeping" else value, step, higher=higher)
lifecycle.judge = judged  # the best is that of step 2
batches = loader.Loader.micro_batches
def read(self, step):
    now["step"] = step + 1
    return batches(self, step)
loader.Loader.micro_batches = read
loss = causal_lm.CausalLM.loss
def spoiled(self, model, batch):
    total, count = loss(self, model, batch)
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    once = {"nan-stop": 3, "nan-skip": 3}.get(now["run"])
    if last and (now["step"] == once or (now["run"] == "nan-cap" and now["step"] >= 3)):
        total = total * float("nan")
    return total, count
causal_lm.CausalLM.loss = spoiled
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run that takes a second, but for imports."""
    root = tmp_path_factory.mktemp("stop")
    (root / "text").mkdir()
    for number in range(8):
        (root / "text" / f"{number}.py").write_text("\n".join(f"x_{number}_{i} = {i * number}" for i in range(60)))
    words = ["experiment=lm_stdlib", *trained.COMMON, *trained.LANGUAGE, *trained.NETWORK, "eval.every=null"]
    words += [f"data.path={root}/text", f"data.cache_dir={root}/cache", "data.tokenizer=bytes"]
    return [*words, "checkpoint.every=null", "train.max_steps=8", "strategy.micro_batch_size=1", f"run.root={root}"]


@pytest.fixture(scope="module")
def root(text: list[str]) -> Path:
    """Runs of one rank and of two, one launch each; what they are about is in their names."""

    def job(name: str, *words: str) -> list[str]:
        return [*text, f"run.name={name}", *words]

    root = Path(text[-1].partition("=")[2])
    stale = RunDir(root / "stale").create()
    stale.ask_to_stop("yesterday")
    os.utime(stale.stop, (1e9, 1e9))
    nans = [
        job("nan-stop"),
        job("nan-skip", "train.nonfinite=skip"),
        job("nan-cap", "train.nonfinite=skip", "train.nonfinite_cap=2", "checkpoint.every=1"),
    ]
    keeping = [
        "checkpoint.every=1",
        "train.max_steps=9",
        "checkpoint.keep_every=4",
        "eval.every=2",
        "eval.max_samples=4",
    ]
    errors = ranks.run_jobs(1, [
        job("save"), job("stale"), job("hurried", "run.max_time=1", "train.max_steps=100000"),
        job("keeping", *keeping, "checkpoint.keep=2"), *nans,
    ], setup=SETUP, check=False)  # fmt: skip
    assert [error is None for error in errors] == [True] * 4 + [False, True, False], errors
    two = [[*words, f"run.root={root}/two", "strategy=zero2"] for words in nans]
    errors = ranks.run_jobs(2, two, setup=SETUP, check=False)
    assert [error is None for error in errors] == [False, True, False], errors
    assert all("NonFinite" in (errors[i] or "") for i in (0, 2)), errors
    return root


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in rundir.read_jsonl(run / "events.jsonl") if event["kind"] == kind]


# ---------------------------------------------------------------------------------------------------- asked for


def test_a_save_file_saves_and_the_run_goes_on(root: Path) -> None:
    assert [event["step"] for event in events(root / "save", "commit")] == [1, 8]
    assert ranks.result(root / "save")["status"] == "finished"
    assert not (root / "save" / "SAVE").exists()


def test_a_stop_that_is_older_than_the_launch_is_taken_away(root: Path) -> None:
    assert ranks.result(root / "stale")["status"] == "finished"
    assert not (root / "stale" / "STOP").exists()


def test_the_time_of_the_launch_is_known_to_a_hundredth_of_a_second(tmp_path: Path) -> None:
    """A STOP of just before is an earlier command's, one of just after is meant for this."""
    say = "import time; from train import lifecycle; print(lifecycle._launched_at())"
    (tmp_path / "accelerate").write_text("import subprocess, sys, time; time.sleep(1); subprocess.run(sys.argv[1:])")
    plain = [sys.executable, "-c", say]
    for command in (plain, [sys.executable, str(tmp_path / "accelerate"), *plain]):
        before = time.time()
        told = float(subprocess.run(command, capture_output=True, text=True, cwd=ranks.ROOT, check=True).stdout)
        later = 0 if command is plain else 1  # the launcher's start counts, not the rank's
        assert before - 0.02 < told < time.time() - later


def test_a_time_limit_stops_and_saves(root: Path) -> None:
    result = ranks.result(root / "hurried")
    assert (result["status"], result["reason"]) == ("stopped", "run.max_time")
    assert rundir.committed(RunDir(root / "hurried"))[-1] == result["steps"]


def test_rotation_keeps_the_last_the_best_and_every_nth(root: Path) -> None:
    run = RunDir(root / "keeping")
    best = checkpoint.Reader(run.checkpoint(9)).manifest["counters"]["best_step"]
    assert best == 2
    assert rundir.committed(run) == [2, 4, 8, 9]
    assert next(checkpoint.choose(run, "best")) == run.checkpoint(best)


# ------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.ranks
@pytest.mark.parametrize("where", [".", "two"])
def test_a_value_that_is_not_finite_never_reaches_a_weight(root: Path, where: str) -> None:
    """It appears on the last rank only, in step 3."""
    skipped, capped, stopped = (root / where / name for name in ("nan-skip", "nan-cap", "nan-stop"))
    lines = rundir.read_jsonl(skipped / "ledger.jsonl")
    assert [line["step"] for line in lines if line.get("skipped")] == [3]
    assert [row["step"] for row in ranks.metrics(skipped) if row["grad_norm"] is None] == [3]
    assert ranks.result(skipped)["steps"] == 8
    assert ledger.verify(RunDir(skipped))["problems"] == []
    assert rundir.committed(RunDir(stopped)) == []
    assert max(rundir.committed(RunDir(capped))) <= 4  # steps 3, 4 and 5 are skipped: one more than the cap
    for run in (skipped, capped):
        for step in rundir.committed(RunDir(run)):
            reader = checkpoint.Reader(RunDir(run).checkpoint(step))
            for name, shape in reader.shapes.items():
                for kind in reader.kinds:
                    assert np.isfinite(reader.read(name, kind, 0, int(np.prod(shape)))).all()


# ------------------------------------------------------------------------------------------------- exit codes, restarts

FAULTY = """
import os
import torch
from train.tasks import causal_lm
loss = causal_lm.CausalLM.loss
def spoiled(self, model, batch):
    if os.environ["FAULT"] == "oom" and os.environ.get("RANK") == "1":
        raise torch.OutOfMemoryError("out of memory, as an allocator would say")
    total, count = loss(self, model, batch)
    return total * float("nan"), count
causal_lm.CausalLM.loss = spoiled
"""


@pytest.mark.ranks
@pytest.mark.parametrize(("fault", "code", "reason"), [("oom", 12, "out_of_memory"), ("nan", 1, "non-finite: ")])
def test_what_would_only_repeat_is_never_started_again(
    text: list[str], tmp_path: Path, fault: str, code: int, reason: str
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = [sys.executable, "-m", "launch", "run", "--plugin", "faulty", *text, f"run.root={tmp_path}", "run.name=r"]
    command += ["run.max_restarts=3", f"hardware.devices_per_node={2 if fault == 'oom' else 1}"]
    env = {**os.environ, "PYTHONPATH": f"{ranks.ROOT}:{tmp_path}", "FAULT": fault}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr[-2000:]
    result = ranks.result(tmp_path / "r")
    assert result["status"] == "failed"
    assert result["reason"].startswith(reason)
    assert result["attempt"] == 1
    if fault == "oom":
        assert [event["rank"] for event in events(tmp_path / "r", "oom")] == [1]


# --------------------------------------------------------------------------------------------------------- nothing moves

HANG = (
    SETUP
    + """
import ctypes
stop.PATIENCE_S = 1.5
planned = read
def hang(self, step):
    if step == 2 and self.rank == self.world_size - 1:
        {how}
    return planned(self, step)
loader.Loader.micro_batches = hang
"""
)
SLEEPS = "time.sleep(1000)"
HOLDS = "ctypes.PyDLL(None).sleep(1000)"
"""The second keeps the interpreter's lock meanwhile, as native code may: no thread of that rank can run."""


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("how", "verdict"), [(SLEEPS, "rank 1 is behind (step 3, reading data)"), (HOLDS, "rank 1 does not answer")]
)
def test_a_hung_rank_is_noticed_and_named_and_every_rank_shows_its_stacks(
    text: list[str], tmp_path: Path, how: str, verdict: str
) -> None:
    words = [*text, f"run.root={tmp_path}", "run.name=hung", "run.step_timeout_s=3"]
    with pytest.raises(RuntimeError, match="a rank died"):
        ranks.run_jobs(2, [words], setup=HANG.replace("{how}", how), timeout_s=60)
    result = ranks.result(tmp_path / "hung")
    assert (result["status"], verdict in result["reason"]) == ("failed", True), result["reason"]
    here, there = ((tmp_path / "hung" / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "in all_reduce" in here
    assert "in hang" in there
    assert "File " in there


def test_a_start_up_that_takes_too_long_is_noticed(text: list[str], tmp_path: Path) -> None:
    setup = "from train import models, stop\nimport time\nstop.PATIENCE_S = 1\n"
    setup += "models.initial_values = lambda *_: time.sleep(1000)"
    words = [*text, f"run.root={tmp_path}", "run.name=slow", "run.startup_timeout_s=15"]
    with pytest.raises(RuntimeError, match="a rank died"):
        ranks.run_jobs(1, [words], setup=setup, timeout_s=60)
    assert "hung for 15 s: rank 0 is behind (start-up)" in ranks.result(tmp_path / "slow")["reason"]
    assert "<lambda>" in (tmp_path / "slow" / "logs" / "rank-0.log").read_text()


def test_the_rank_behind_is_the_one_that_others_wait_for() -> None:
    def place(marks: int, waits: bool, doing: str = "step 1, forward") -> dict:
        return {"marks": marks, "waits": waits, "doing": doing}

    ahead, late = place(7, True), place(6, True, "step 1, backward")
    assert stop.behind({0: ahead, 1: late}, 2) == "rank 1 is behind (step 1, backward)"
    assert stop.behind({0: ahead, 1: place(7, False), 2: ahead}, 3) == "rank 1 is behind (step 1, forward)"
    assert stop.behind({0: ahead, 2: late}, 3) == "rank 1 does not answer"
    assert stop.behind({0: ahead, 1: ahead}, 2) == "all ranks got equally far (step 1, forward)"
    assert json.dumps(ahead)
