"""Real training on a real Slurm: the laws through time limits, preemption, dead nodes and changing sizes.

`numerics=exact` makes a run's final state a matter of equality: one lost, repeated or reordered sample would show. Faults
by the dozen, on a stand-in for the training, are in `test_launch_slurm.py`. What takes minutes is marked `slow`
(`make slurm-all`); figures are printed, and shown with -rP.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from launch import slurm
from tests import ranks, slurm_cluster
from tests.slurm_cluster import CHECKOUT, Cluster, wait_for
from train import checkpoint, ledger, rundir
from train.rundir import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.ranks]

SMALL = [
    "experiment=lm_stdlib", "hardware=cpu", "tracker=none", "train.precision=fp32", "optim.lr=1e-3", "log.every=1",
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "data.seq_len=64", "data.tokenizer=bytes",
    "eval.max_samples=16", "eval.samples=0", "strategy.persistence_threshold=0", "slurm.time=10",
]  # fmt: skip
FAST = ["train.max_steps=20", "train.global_batch_size=8"]
EXACT = ["numerics=exact", "train.max_steps=120", "train.global_batch_size=12", "checkpoint.every=10"]
LONG = [*EXACT, "train.max_steps=400"]
RESIZED = [*FAST, "train.max_steps=160", "checkpoint.every=10"]


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.start("--nodes", "4") as running:
        yield running


@pytest.fixture
def free(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for key in ("PATH", "SLURM_CONF", "GEARSHIFT_DEVCLUSTER"):
        monkeypatch.setenv(key, cluster.env[key])
    cluster.idle()
    return cluster


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("data")
    for number in range(40):
        lines = (f"def f_{number}_{line}(x):\n    return x + {line * number}\n" for line in range(20))
        (text / f"{number}.py").write_text("\n".join(lines))
    return [*SMALL, f"data.path={text}"]


@pytest.fixture(scope="module")
def unbroken(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in one process and without any fault."""
    root = tmp_path_factory.mktemp("unbroken")
    return _alone(root, settings, fast=FAST, exact=EXACT)


@pytest.fixture(scope="module")
def unbroken_long(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _alone(tmp_path_factory.mktemp("long"), settings, long=LONG, resized=RESIZED)


def _alone(root: Path, settings: list[str], **jobs: list[str]) -> Path:
    ranks.run_jobs(1, [[*settings, *words, f"run.root={root}", f"run.name={name}"] for name, words in jobs.items()])
    return root


class Job:
    """A run that `gearshift run` submitted."""

    def __init__(self, cluster: Cluster, root: Path, *words: str) -> None:
        self.cluster, self.run = cluster, RunDir(root / "r")
        command = [sys.executable, "-m", "launch", "run", "slurm=devcluster", f"run.root={root}", "run.name=r", *words]
        self._submit(command)

    def resume(self) -> None:
        """`gearshift resume`, as the log of a run that has ended says."""
        self._submit([sys.executable, "-m", "launch", "resume", str(self.run.path), "slurm=devcluster"])

    def _submit(self, command: list[str]) -> None:
        done = subprocess.run(command, env=self.cluster.env, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        self.id = slurm.state(self.run)["job"]

    def notice(self) -> None:
        """What Slurm does `--signal` seconds before the limit, at once."""
        self.cluster.run("scancel", "-s", "USR1", "--batch", self.id)

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.id)["NodeList"]).split()

    def steps(self) -> list[dict]:
        return rundir.read_jsonl(self.run.ledger)

    def kinds(self, kind: str) -> list[dict]:
        return [event for event in rundir.read_jsonl(self.run.events) if event["kind"] == kind]

    def attempt_at(self, attempt: int, step: int = 1, timeout: float = 90) -> None:
        """Wait until an attempt has completed a step."""
        wait_for(lambda: any(s["attempt"] >= attempt and s["step"] >= step for s in self.steps()), timeout, self.log)

    def ends(self, timeout: float = 150) -> dict:
        facts = self.cluster.wait(self.id, timeout=timeout)
        assert facts["JobState"] == "COMPLETED", self.log()
        return self.run.result()

    def clean(self) -> None:
        """Every sample exactly once, and checkpoints that are whole."""
        assert ledger.verify(self.run)["problems"] == []

    def seamless(self) -> None:
        """No step was done twice: a notice costs nothing."""
        attempts = sorted({line["attempt"] for line in self.steps()})
        spans = [[line["step"] for line in self.steps() if line["attempt"] == number] for number in attempts]
        assert all(after[0] == before[-1] + 1 for before, after in pairwise(spans)), self.log()

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.run.logs.glob("slurm-*.log"))


def differences(run: Path, reference: Path) -> tuple[float, float]:
    """Largest relative difference of losses and of gradient norms, step by step; of a step the last attempt counts."""
    a, b = ({row["step"]: row for row in rundir.read_jsonl(path / "metrics.jsonl")} for path in (run, reference))
    assert a.keys() == b.keys()
    loss = max(abs(a[step]["loss"] - b[step]["loss"]) / abs(b[step]["loss"]) for step in a)
    norm = max(abs(a[step]["grad_norm"] - b[step]["grad_norm"]) / b[step]["grad_norm"] for step in a)
    return loss, norm


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_two_nodes_train_like_one_process(free, settings, unbroken, tmp_path, strategy):
    job = Job(free, tmp_path, *settings, *FAST, "hardware.nodes=2", f"strategy={strategy}")
    result = job.ends()
    assert (result["engine"]["strategy"], result["engine"]["world_size"]) == (strategy, 2)
    loss, norm = differences(job.run.path, unbroken / "fast")
    print(f"{strategy} on two nodes: losses within {loss:.1e}, norms {norm:.1e}")
    assert loss <= 1e-5
    assert norm <= 1e-3
    job.clean()


def test_notices_cost_nothing(free, settings, unbroken, tmp_path):
    """Three allocations ended by notice, one of them during import: the last state is that of the unbroken run."""
    job = Job(free, tmp_path, *settings, *EXACT, "hardware.nodes=2", "checkpoint.every=null")
    wait_for(lambda: job.kinds("launch"), 30, job.log)
    time.sleep(1)  # the ranks import
    job.notice()
    for attempt, step in ((2, 20), (3, 60)):
        job.attempt_at(attempt, step)
        job.notice()
    result = job.ends()
    assert [event["cause"] for event in job.kinds("settle")] == ["time limit"] * 3 + ["finished"]
    assert result["state_hash"] == ranks.result(unbroken / "exact")["state_hash"]
    job.seamless()
    job.clean()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_time_limit(free, settings, unbroken_long, tmp_path):
    """Slurm's own notice before a limit of a minute, then two more: three allocations in a row end by notice."""
    words = [*settings, *LONG, "checkpoint.every=null", "hardware.nodes=2"]
    job = Job(free, tmp_path, *words, "slurm.time=1", "slurm.signal_s=10")
    job.attempt_at(2, timeout=150)
    real = len(job.kinds("settle"))
    for attempt in (2, 3):
        job.attempt_at(attempt)
        job.notice()
    result = job.ends(timeout=300)
    causes = [event["cause"] for event in job.kinds("settle")]
    assert real == 1
    assert set(causes) == {"time limit", "finished"}
    assert len(causes) >= 4
    assert result["state_hash"] == ranks.result(unbroken_long / "long")["state_hash"]
    job.seamless()
    job.clean()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_notice_at_any_moment(free, settings, unbroken, tmp_path):
    """During import, the first step, an evaluation, a save."""
    words = [*settings, *EXACT, "hardware.nodes=2", "eval.every=15", "eval.max_samples=200", "checkpoint.every=20"]
    job = Job(free, tmp_path, *words)

    def began(attempt: int) -> bool:
        return any(event["attempt"] == attempt for event in job.kinds("start") + job.kinds("resume"))

    wait_for(lambda: job.kinds("launch"), 30, job.log)
    time.sleep(1)
    job.notice()  # import: saved after the first step
    wait_for(lambda: began(2), 60, job.log)
    job.notice()  # the first step
    wait_for(lambda: any(s["attempt"] == 3 and s["step"] % 15 == 0 for s in job.steps()), 60, job.log)
    job.notice()  # an evaluation: it follows the ledger's line
    wait_for(lambda: any(event["attempt"] == 4 for event in job.kinds("save")), 60, job.log)
    job.notice()
    result = job.ends()
    assert [event["cause"] for event in job.kinds("settle")] == ["time limit"] * 4 + ["finished"]
    assert result["state_hash"] == ranks.result(unbroken / "exact")["state_hash"]
    job.seamless()
    job.clean()
    print(f"notices at steps {[max(s['step'] for s in job.steps() if s['attempt'] == n) for n in (1, 2, 3, 4)]}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crash_loop_ends_and_can_be_resumed(free, settings, unbroken, tmp_path):
    """A rank dies twice before anything was saved: the run ends with a reason, and its last word continues it."""
    job = Job(free, tmp_path, *settings, *EXACT, "hardware.nodes=2", "checkpoint.every=null")
    for attempt in (1, 2):
        job.attempt_at(attempt, 5)
        os.kill(_rank(attempt - 1, job.run), 9)
    assert free.wait(job.id, timeout=90)["ExitCode"] == "1:0"
    result = job.run.result()
    assert result["status"] == "failed"
    assert result["reason"].startswith("no-progress: 2 attempts in a row ended without a new checkpoint")
    assert "gearshift resume" in job.log()
    job.resume()
    assert job.ends()["state_hash"] == ranks.result(unbroken / "exact")["state_hash"]
    job.clean()


@pytest.mark.parametrize("partition", ["preempt", pytest.param("grace", marks=pytest.mark.slow)])
def test_preemption_costs_nothing(free, settings, unbroken, tmp_path, partition):
    words = [*settings, *EXACT, "checkpoint.every=null", "slurm.cpus_per_task=4"]
    job = Job(free, tmp_path, *words, "hardware.nodes=2", f"slurm.partition={partition}")
    job.attempt_at(1, 10)
    free.run("srun", "-N4", "-c4", "true")
    result = job.ends()
    assert result["attempt"] == 2
    assert result["state_hash"] == ranks.result(unbroken / "exact")["state_hash"]
    job.seamless()
    job.clean()


@pytest.mark.slow
def test_scancel_saves_and_ends(free, settings, unbroken, tmp_path):
    job = Job(free, tmp_path, *settings, *EXACT, "hardware.nodes=2", "checkpoint.every=null")
    job.attempt_at(1, 10)
    free.run("scancel", job.id)
    facts = free.wait(job.id)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert job.run.result()["status"] == "stopped", job.log()
    assert rundir.committed(job.run) == [job.steps()[-1]["step"]]
    job.clean()
    job.resume()
    assert job.ends()["state_hash"] == ranks.result(unbroken / "exact")["state_hash"]
    job.seamless()
    job.clean()


@pytest.mark.parametrize(
    "fault", ["cut", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("rank", "kill", "poweroff"))]
)
def test_a_loss_costs_less_than_an_interval(free, settings, unbroken, tmp_path, fault):
    """A rank is killed; a node dies, loudly or silently, or is cut off while its processes live on."""
    job = Job(free, tmp_path, *settings, *EXACT, "hardware.nodes=2")
    job.attempt_at(1, 25)
    node = job.nodes()[1]
    lost_at = time.monotonic()
    if fault == "rank":
        os.kill(_rank(1, job.run), 9)
    else:
        free.tool("node", fault, node)
    wait_for(lambda: len(job.kinds("launch")) > 1, 90, job.log)
    noticed = time.monotonic() - lost_at
    if fault == "cut":
        job.attempt_at(2)
        free.tool("node", "heal", node)
    result = job.ends()
    assert noticed < 60
    assert result["state_hash"] == ranks.result(unbroken / "exact")["state_hash"]
    job.clean()
    first = max(line["step"] for line in job.steps() if line["attempt"] == 1)
    again = next(event["step"] for event in job.kinds("resume"))
    assert 0 <= first - again <= 10
    print(f"{fault}: noticed after {noticed:.1f} s, {first - again} steps done again")


def _rank(number: int, run: RunDir) -> int:
    """The process of a run's rank on this machine, wherever its namespace is."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={number}".encode() in environment and b"accelerate.commands.launch" not in words and b"-m" in words:
            if not any(str(run.path.parent).encode() in word for word in words):
                continue
            return int(directory.name)
    raise AssertionError(f"no rank {number}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_takes_what_it_is_granted(free, settings, unbroken_long, tmp_path):
    """Four nodes, then two when two have died, then four again at the next start: one run, one curve."""
    job = Job(free, tmp_path, *settings, *RESIZED, "strategy=fsdp2", "hardware.nodes=2-4")
    job.attempt_at(1, 15)
    dead = job.nodes()[2:]
    for node in dead:
        free.tool("node", "kill", node)
    free.run("scontrol", "update", f"nodename={','.join(dead)}", "state=down", "reason=test")
    wait_for(lambda: job.kinds("resume"), 90, job.log)
    for node in dead:
        free.tool("node", "start", node)
    wait_for(lambda: len(free.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle").splitlines()) == 2, 30)
    job.notice()
    result = job.ends()
    # A node that is just back may refuse its task once; the launch is repeated in the same allocation.
    assert [nodes for nodes, _ in groupby(event["nodes"] for event in job.kinds("launch"))] == [4, 2, 4]
    assert [event["world_size"] for event in job.kinds("start") + job.kinds("resume")] == [4, 2, 4]
    reference = unbroken_long / "resized"
    assert result["math_hash"] == ranks.result(reference)["math_hash"]
    loss, norm = differences(job.run.path, reference)
    ours, theirs = (checkpoint.read_masters(path, "last") for path in (job.run.path, reference))
    state = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    print(f"4, 2, 4 nodes: losses within {loss:.1e}, norms {norm:.1e}, final masters {state:.1e}")
    assert (loss <= 1e-5, norm <= 1e-3, state <= 1e-5) == (True, True, True)
    job.clean()


# ----------------------------------------------------------------------------------------------------------- overheads

BY_HAND = """#!/bin/bash
#SBATCH --nodes=2 --output=/dev/null
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1
srun --ntasks-per-node=1 bash -c 'exec "$0" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 \\
    --node-rank="$SLURM_NODEID" --master-addr='"$address"' --master-port=29400 -m train "$@"' "$@"
"""


def began(run: RunDir, kind: str = "start") -> float:
    """Monotonic time of an attempt's first step, as the run tells it."""
    events = wait_for(lambda: [e for e in rundir.read_jsonl(run.events) if e["kind"] == kind], 90)
    return events[-1]["t"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_step_comes_as_soon_as_by_hand(free, settings, tmp_path):
    script = tmp_path / "by-hand.sbatch"
    script.write_text(BY_HAND)
    ours, hand = [], []
    for turn in range(3):
        job = Job(free, tmp_path / str(turn), *settings, *FAST, "hardware.nodes=2", "strategy=ddp")
        ours.append(began(job.run) - job.kinds("submit")[0]["t"])
        job.ends()
        run = RunDir(tmp_path / f"hand-{turn}" / "r")
        words = [*settings, *FAST, "hardware.nodes=2", "strategy=ddp", f"run.root={run.path.parent}", "run.name=r"]
        submitted = time.monotonic()
        done = free.run("sbatch", "--parsable", script, sys.executable, *words, cwd=CHECKOUT)
        hand.append(began(run) - submitted)
        free.wait(done.strip())
    print(f"submission to first step: ours {ours}, by hand {hand}")
    assert statistics.median(ours) <= 1.2 * statistics.median(hand)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_is_back_as_soon_as_under_torchrun(free, settings, tmp_path):
    words = [*settings, *EXACT, "train.max_steps=2000"]
    ours, bare = [], []
    for turn in range(3):
        job = Job(free, tmp_path / str(turn), *words, "hardware.devices_per_node=2", "slurm.cpus_per_task=2")
        job.attempt_at(1, 15)
        killed = time.monotonic()
        os.kill(_rank(1, job.run), 9)
        ours.append(began(job.run, "resume") - killed)
        free.run("scancel", job.id)
        free.wait(job.id)

        run = RunDir(tmp_path / f"bare-{turn}" / "r")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "--max-restarts=3",
        ]
        command += ["-m", "train", *words, "hardware.devices_per_node=2", f"run.root={run.path.parent}", "run.name=r"]
        with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as agent:
            wait_for(lambda r=run: len(rundir.read_jsonl(r.ledger)) > 15, 90)
            killed = time.monotonic()
            os.kill(_rank(1, run), 9)
            bare.append(began(run, "resume") - killed)
            run.stop.touch()
            agent.wait(60)
    print(f"kill to next step: ours {ours}, bare torchrun {bare}")
    assert statistics.median(ours) <= 2 * statistics.median(bare)
