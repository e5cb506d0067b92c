"""launch/sweep.py: numbers, slots, and what a killed sweep leaves for the next start.

Every job goes through the real `gearshift run`; what it launches is `standin_train.py`, so that a job takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import sweep
from tests import slurm_cluster
from tests.slurm_cluster import CHECKOUT, Cluster, wait_for
from tests.standin_train import final_state
from train import rundir
from train.rundir import RunDir

TWO_CORES = sorted(os.sched_getaffinity(0))[:2]
TWELVE = "seed=" + ",".join(map(str, range(1, 13)))
needs_two_cores = pytest.mark.skipif(len(TWO_CORES) < 2, reason="two slots on a CPU are two cores")


class Lab:
    """A place for sweeps: tiny data, and an `accelerate launch` that starts the stand-in."""

    def __init__(self, path: Path, **plan: object) -> None:
        self.path, self.root = path, path / "runs"
        fake = path / "shadow" / "accelerate" / "commands"
        fake.mkdir(parents=True)
        for package in (fake, fake.parent):
            (package / "__init__.py").touch()
        (path / "plan.json").write_text(json.dumps({"steps": 10, "step_s": 0.05, "every": 5, **plan}))
        words = f"[sys.executable, {str(CHECKOUT / 'tests' / 'standin_train.py')!r}, {str(path / 'plan.json')!r}]"
        (fake / "launch.py").write_text(
            f"import os, sys\nos.execv(sys.executable, {words} + sys.argv[sys.argv.index('train') + 1 :])\n"
        )
        (path / "data").mkdir()
        for name in "abcdefgh":
            (path / "data" / f"{name}.py").write_text(name * 4000)
        self.env = {**os.environ, "PYTHONPATH": f"{path / 'shadow'}:{CHECKOUT}"}
        self.fixed = ["hardware=cpu", "tracker=none", f"run.root={self.root}", f"data.path={path / 'data'}",
                      "data.tokenizer=bytes", "data.seq_len=64", f"data.cache_dir={path / 'cache'}"]  # fmt: skip

    def command(self, *words: str, verb: tuple[str, ...] = ("-m", "launch", "run", "-m")) -> list[str]:
        return [sys.executable, *verb, *self.fixed, *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        log = (self.path / "sweep.log").open("a")
        return subprocess.Popen(self.command(*words), env=self.env, stdout=log, stderr=log, cwd=self.path, text=True)

    def call(self, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
        command = self.command(*words, **more)
        return subprocess.run(command, env=self.env, capture_output=True, text=True, cwd=self.path, timeout=240)

    def sweep(self) -> sweep.Sweep:
        (found,) = self.root.glob("*/sweep.json")
        return sweep.read(found.parent)

    def ends(self) -> dict[str, int]:
        """How often each job was trained to its end."""
        return {
            path.parent.name: sum(event["kind"] == "end" and "step" in event for event in rundir.read_jsonl(path))
            for path in self.root.glob("*/*/events.jsonl")
        }


# ------------------------------------------------------------------------------------------------------- in a process


def test_numbers_stay(tmp_path):
    one = sweep.Sweep(tmp_path, [])
    first = one.add([["a=1"], ["a=2"]])
    again = one.add([["a=2"], ["a=3"], ["a=1"]])
    assert [job.number for job in first] == [0, 1]
    assert [job.number for job in again] == [1, 2, 0]
    one.write()
    assert [job.overrides for job in sweep.read(tmp_path).jobs] == [["a=1"], ["a=2"], ["a=3"]]


def test_the_name_follows_what_is_learned():
    def name(*shared: str) -> str:
        return sweep._digest([[*shared, f"optim.lr={lr}"] for lr in (1, 2)])

    assert name() == name("hardware=cpu", "log.every=1", "slurm=cluster", "slurm.array_cap=2")
    assert name() != name("seed=1")
    differing = [["strategy=ddp"], ["strategy=fsdp2"]]
    assert sweep._digest(differing) != sweep._digest([["strategy=ddp"], ["strategy=zero2"]]), "swept, so it counts"


@pytest.mark.parametrize("verb", [("-m", "launch", "run", "-m"), ("-m", "train", "-m")], ids=["gearshift", "train"])
def test_no_sweep_inside_of_a_launch(tmp_path, verb):
    lab = Lab(tmp_path)
    lab.env["WORLD_SIZE"] = "2"
    done = lab.call("optim.lr=1e-3,2e-3", verb=verb)
    assert done.returncode == 2
    assert "gearshift run" in done.stderr
    assert "optim.lr=1e-3,2e-3" in done.stderr
    assert not lab.root.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["optim.lrr=1,2"], "Did you mean optim.lr"),
        (["optim.lr=x,y"], "must be a number"),
        (["optim.lr=1,2["], "optim.lr=1,2["),
    ],
)
def test_a_bad_command_starts_nothing(tmp_path, words, text):
    lab = Lab(tmp_path)
    done = lab.call(*words)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/0*"))


def test_dry_run_shows_every_job(tmp_path):
    lab = Lab(tmp_path)
    done = lab.call("data.fold=0,1,2", "run.name=folds", "--dry-run")
    lines = [line for line in done.stderr.splitlines() if "launch run" in line]
    assert [
        f"data.fold={fold}" in line and f"'00{fold}'" in line.replace("'\"", "") for fold, line in enumerate(lines)
    ] == [True] * 3
    assert not lab.root.exists()


# ---------------------------------------------------------------------------------------------------- process trees


def test_one_bad_job_does_not_end_the_others(tmp_path):
    lab = Lab(tmp_path, fail_at=3, fail_seed=2, fail_reason="ValueError: planted")
    done = lab.call("seed=1,2,oops", "run.name=s")
    assert done.returncode == 1, done.stderr
    assert [job.status for job in lab.sweep().jobs] == ["finished", "failed", "failed"]
    assert "ValueError: planted" in done.stderr
    assert "seed=oops: must be a whole number" in done.stderr
    assert (lab.root / "s" / "001" / "logs" / "job.log").exists()


@needs_two_cores
def test_killed_three_times_it_still_finishes_each_job_once(tmp_path):
    """12 jobs on two slots, one of which always fails; the parent is killed at random moments."""
    lab = Lab(tmp_path, steps=30, fail_at=12, fail_seed=5, fail_reason="ValueError: planted")
    words = [TWELVE, "hydra.launcher.slots=2"]
    chance = random.Random(7)
    for _ in range(3):
        parent = lab.start(*words)
        time.sleep(chance.uniform(4, 12))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    last = lab.start(*words)
    assert last.wait(240) == 1
    found = lab.sweep()
    assert [job.number for job in found.jobs] == list(range(12))
    failed = [job for job in found.jobs if job.status != "finished"]
    assert [(job.status, job.reason, "seed=5" in job.overrides) for job in failed] == [
        ("failed", "ValueError: planted", True)
    ]
    for job in found.jobs:
        if job.status == "finished":
            assert found.run(job).result()["state_hash"] == final_state(30)
            assert lab.ends()[job.name] == 1, "a finished job was run again"
    assert "seed=12" in sweep.best(found).overrides
    assert "ValueError: planted" in sweep.table(found)
    before = {job.name: found.run(job).events.read_bytes() for job in found.jobs if job.status == "finished"}
    assert lab.start(*words).wait(240) == 1
    assert all((found.path / name / "events.jsonl").read_bytes() == content for name, content in before.items())


@needs_two_cores
@pytest.mark.parametrize(("processes", "at_once"), [(1, 2), (2, 1)])
def test_slots_are_never_shared(tmp_path, processes, at_once):
    lab = Lab(tmp_path, steps=10)
    done = lab.call("seed=1,2,3,4", f"hardware.devices_per_node={processes}", "run.name=s", "hydra.launcher.slots=2")
    assert done.returncode == 0, done.stderr
    spans, cores = [], []
    for path in lab.root.glob("s/*/events.jsonl"):
        events = rundir.read_jsonl(path)
        spans.append((events[0]["t"], events[-1]["t"]))
        cores.append(tuple(events[0]["cores"]))
    overlap = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert overlap == at_once
    assert set(cores) == ({(core,) for core in TWO_CORES} if processes == 1 else {tuple(TWO_CORES)})


def test_more_devices_than_there_are(tmp_path, monkeypatch):
    """A job that needs more GPUs than the machine has is infeasible, and is not launched."""
    lab = Lab(tmp_path)
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n")
    (fake / "nvidia-smi").chmod(0o755)
    lab.env["PATH"] = f"{fake}:{lab.env['PATH']}"
    done = lab.call("hardware=auto", "hardware.devices_per_node=1,3", "run.name=s")
    assert done.returncode == 1
    one, three = lab.sweep().jobs
    assert (one.status, three.status) == ("finished", "infeasible"), done.stderr
    assert not (lab.root / "s" / "001").exists()


def test_it_is_asked_to_stop_and_goes_on(tmp_path):
    lab = Lab(tmp_path, steps=100)
    parent = lab.start("seed=1,2,3,4", "run.name=s")
    wait_for(lambda: list(lab.root.glob("s/*/ledger.jsonl")), 30)
    rival = lab.call("seed=1,2,3,4", "run.name=s")
    assert rival.returncode == 1
    assert f"by process {parent.pid}" in rival.stderr
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 75
    statuses = [job.status for job in lab.sweep().jobs]
    assert "stopped" in statuses
    assert "waiting" in statuses
    assert "running" not in statuses
    assert lab.start("seed=1,2,3,4", "run.name=s").wait(120) == 0
    assert all(lab.sweep().run(job).result()["state_hash"] == final_state(100) for job in lab.sweep().jobs)


# ------------------------------------------------------------------------------------------------------ one Slurm array


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.start("--nodes", "2", "--cpus", "4") as running:
        yield running


def on_slurm(lab: Lab, cluster: Cluster, **plan: object) -> list[str]:
    """Settings with which a sweep goes to the cluster, and its ranks are the stand-in."""
    lab.env |= {key: cluster.env[key] for key in ("SLURM_CONF", "GEARSHIFT_DEVCLUSTER")}
    lab.env |= {"PATH": cluster.env["PATH"], "PYTHONPATH": str(CHECKOUT)}
    python = slurm_cluster.standin(lab.path, **plan)
    return ["slurm=devcluster", f"slurm.setup=['python={python}']", "slurm.array_cap=2", "run.name=s"]


@pytest.mark.slurm
def test_the_same_as_an_array(tmp_path, cluster):
    """12 tasks, two at a time, of which one always fails; three times one that trains is killed at random."""
    lab = Lab(tmp_path)
    words = on_slurm(lab, cluster, steps=20, step_s=0.05, every=1, fail_at=12, fail_seed=11, fail_reason="bad_config")
    words += [TWELVE]
    done = lab.call(*words)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: len(cluster.run("squeue", "-h", "-t", "R").splitlines()) == 2, 20)
    assert "nothing" not in lab.call(*words).stderr, "what is queued is left alone"
    assert len(set(cluster.run("squeue", "-h", "-o", "%F").split())) == 1
    chance = random.Random(7)
    for _ in range(3):
        os.kill(chance.choice(wait_for(lambda: slurm_cluster.standins(tmp_path), 20)), signal.SIGKILL)
        time.sleep(chance.uniform(1, 3))
    wait_for(lambda: not cluster.run("squeue", "-h"), 120)
    found = lab.sweep()
    failed = [job for job in found.jobs if job.status != "finished"]
    assert [(job.status, "seed=11" in job.overrides) for job in failed] == [("failed", True)]
    assert all(found.run(job).result()["state_hash"] == final_state(20) for job in found.jobs if job not in failed)
    assert all(count <= 1 for count in lab.ends().values())
    assert lab.call(*words, "--wait").returncode == 1
    assert all(count <= 1 for count in lab.ends().values()), "a finished job was run again"


@pytest.mark.slurm
def test_a_task_that_cannot_fit_is_not_submitted(tmp_path, cluster):
    lab = Lab(tmp_path)
    words = [
        *on_slurm(lab, cluster, steps=3),
        "hardware.memory_gib=2",
        "model.hidden_size=32,4096",
        "model.num_layers=8",
    ]
    assert lab.call(*words).returncode == 0
    wait_for(lambda: not cluster.run("squeue", "-h"), 60)
    small, large = lab.sweep().jobs
    assert (small.status, large.status) == ("finished", "infeasible")
    assert "GiB" in large.reason
    assert not (lab.root / "s" / "001").exists()


@pytest.mark.slurm
@pytest.mark.slow
def test_a_preempted_task_of_an_array_goes_on(tmp_path, cluster):
    lab = Lab(tmp_path)
    words = [
        *on_slurm(lab, cluster, steps=80, every=1000),
        "slurm.partition=preempt",
        "slurm.cpus_per_task=4",
        "seed=1,2",
    ]
    assert lab.call(*words).returncode == 0
    wait_for(lambda: len(list(lab.root.glob("s/*/ledger.jsonl"))) == 2, 40)
    cluster.run("srun", "-N2", "-c4", "true")
    wait_for(lambda: not cluster.run("squeue", "-h"), 120)
    assert [lab.sweep().run(job).result()["state_hash"] for job in lab.sweep().jobs] == [final_state(80)] * 2


@pytest.mark.slurm
def test_an_array_by_hand(tmp_path, cluster):
    lab = Lab(tmp_path)
    on_slurm(lab, cluster, steps=5)
    lab.env["python"] = str(tmp_path / "python")
    words = [*lab.fixed, "seed=1,2,3", "run.name=s"]
    script = CHECKOUT / "slurm" / "array.sbatch"
    command = ["sbatch", "--parsable", "--array=0-3", f"--output={tmp_path}/%a.log", script, *words]
    job = subprocess.run(command, env=lab.env, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()
    wait_for(lambda: not cluster.run("squeue", "-h"), 60)
    assert [job.status for job in lab.sweep().jobs] == ["finished"] * 3, (tmp_path / "0.log").read_text()
    assert cluster.job(f"{job}_3")["ExitCode"] == "2:0"
    assert "use --array=0-2" in (tmp_path / "3.log").read_text()
    assert RunDir(lab.root / "s" / "002").result()["objective"] == 0.25


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
@needs_two_cores
def test_as_fast_as_bare_processes(tmp_path):
    """Real training: eight jobs on two slots, against as many `accelerate launch` started by xargs, two at a time."""
    lab = Lab(tmp_path)
    lab.env["PYTHONPATH"] = str(CHECKOUT)
    words = [
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.num_heads=2",
        "train.max_steps=1500",
        "eval.samples=0",
    ]
    words += ["train.global_batch_size=8", "train.precision=fp32", "eval.max_samples=8"]
    assert lab.call("run.name=warm", "seed=9", *words).returncode == 0
    times: dict[str, float] = {}
    for turn in (1, 2):
        started = time.monotonic()
        seeds = "seed=" + ",".join(str(8 * turn + n) for n in range(8))
        assert lab.call(f"run.name=sweep{turn}", seeds, "hydra.launcher.slots=2", *words).returncode == 0
        ours = time.monotonic() - started
        jobs = "\n".join(f"run.name=bare{turn}-{n} seed={8 * turn + n}" for n in range(8))
        started = time.monotonic()
        launch = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
        launch += ["--dynamo_backend=no", "--module", "train"]
        command = ["xargs", "-P2", "-L1", sys.executable, *launch, *lab.fixed, *words]
        subprocess.run(command, input=jobs, env=lab.env, cwd=tmp_path, text=True, check=True, capture_output=True)
        bare = time.monotonic() - started
        times[f"sweep {ours:.1f} s, bare {bare:.1f} s"] = ours / bare
    print(times)
    assert min(times.values()) <= 1.1
