"""launch/slurm.py and slurm/train.sbatch: the text of a job, the decision after it, and its life on real daemons.

On the cluster the training is `standin_train.py`, so that each fault takes seconds; real training is in
`test_slurm_training.py`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from launch import slurm
from tests import slurm_cluster
from tests.slurm_cluster import Cluster, wait_for
from tests.standin_train import final_state
from train import config, rundir
from train.rundir import RunDir

GOLDEN = Path(__file__).parent / "golden"

# -------------------------------------------------------------------------------------------------------------- text

JOBS = {
    "one_gpu": ["hardware=gpu_24gb", "slurm.partition=gpu", "slurm.account=proj-1", "slurm.time=12:00:00"],
    "one_node": ["hardware=node_8x80gb", "slurm.gpus_per_node=a100:8", "slurm.cpus_per_task=64", "slurm.mem=480G"],
    "many_nodes": [
        "hardware=nodes_2x8x80gb",
        "hardware.nodes=2-8",
        "train.global_batch_size=64",
        "slurm.qos=long",
        "slurm.extra=['--exclusive']",
    ],
    "container": [
        "hardware=gpu_8gb",
        "slurm.setup=['module load apptainer', 'inside() { apptainer exec --nv /images/gearshift.sif \"$@\"; }']",
    ],
}


def job_config(*overrides: str) -> config.Config:
    return config.compose(["slurm=cluster", "tracker=none", *overrides])


@pytest.mark.golden
@pytest.mark.parametrize("name", JOBS)
def test_texts(name):
    run = RunDir("/data/runs/lm-0123abcd")
    text = slurm.render(
        job_config(*JOBS[name]), run, ["--config", f"{run.code}/config.yaml"], python="/opt/env/bin/python"
    )
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text(), "if the change is meant: GOLDEN=write pytest tests/test_launch_slurm.py -k texts"


@pytest.mark.parametrize("name", [*JOBS, "by hand"])
def test_texts_are_shell(name):
    file = slurm.SCRIPT if name == "by hand" else GOLDEN / f"{name}.sbatch"
    assert subprocess.run(["bash", "-n", file], capture_output=True).returncode == 0


HOSTILE = [
    "$(touch OWNED)",
    "`touch OWNED`",
    "; touch OWNED #",
    "' ; touch OWNED '",
    '" ; touch OWNED "',
    "a\nb",
    "-e",
    "*",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_words_arrive_as_they_are(word, tmp_path):
    """The preamble of a rendered script, run by a real shell, hands every hostile word on unchanged."""
    run = RunDir(tmp_path / word.replace("/", "").replace("\n", "-") / "run")
    text = slurm.render(job_config(), run, ["--config", word, f"a={word}"], python=word)
    script = text[: text.index(slurm.BODY)] + 'printf "%s\\0" "$python" "$code" "$@"\n'
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert out.split("\0")[:-1] == [word, str(run.code), "--config", word, f"a={word}"]
    assert not (tmp_path / "OWNED").exists()


def test_a_path_that_directives_cannot_hold():
    with pytest.raises(slurm.SlurmError, match="neither line breaks nor backslashes"):
        slurm.render(job_config(), RunDir("/data/a\nb"), [])


# ---------------------------------------------------------------------------------------------------------- decisions

RUNNING = {
    "JobState": "RUNNING",
    "Restarts": "0",
    "PreemptTime": "None",
    "RunTime": "00:10:00",
    "TimeLimit": "01:00:00",
}
STOP_USR1, STOP_TERM = "notice from Slurm (USR1)", "notice from Slurm (TERM)"


def stopped(reason: str) -> dict:
    return {"status": "stopped", "reason": reason, "steps": 7, "attempt": 1}


def failed(reason: str) -> dict:
    return {"status": "failed", "reason": reason, "attempt": 1}


CASES = {
    "finished": (dict(result={"status": "finished"}), "end", 0),
    "finished although preempted": (dict(result={"status": "finished"}, facts={"PreemptTime": "2026"}), "end", 0),
    "notice, saved": (dict(result=stopped(STOP_USR1), heard={"USR1"}), "requeue time limit", 75),
    "notice, died while saving": (dict(result={"status": "running"}, heard={"USR1"}), "requeue time limit", 1),
    "notice before the ranks began": (dict(result={}, heard={"USR1"}, code=0), "requeue time limit", 0),
    "the limit was reached": (
        dict(result=stopped(STOP_TERM), heard={"TERM"}, facts={"JobState": "COMPLETING", "RunTime": "01:00:01"}),
        "requeue time limit",
        75,
    ),
    "preempted in its grace, nothing heard": (
        dict(result=stopped(STOP_TERM), facts={"PreemptTime": "2026-01-01T00:00:00"}),
        "requeue preempted",
        75,
    ),
    "preempted, ranks signalled": (
        dict(result=stopped("signal SIGTERM"), facts={"PreemptTime": "2026"}),
        "requeue preempted",
        75,
    ),
    "Slurm requeues by itself": (
        dict(result=stopped(STOP_TERM), heard={"TERM"}, facts={"JobState": "COMPLETING", "Restarts": "1"}),
        "end ended by Slurm",
        75,
    ),
    "scancel": (dict(result=stopped(STOP_TERM), heard={"TERM"}, facts={"JobState": "COMPLETING"}), "end cancelled", 75),
    "scancel, not saved": (
        dict(result={"status": "running"}, heard={"TERM"}, code=137, facts={"JobState": "COMPLETING"}),
        "end cancelled",
        1,
    ),
    "kill -TERM by a person": (dict(result=stopped(STOP_TERM), heard={"TERM"}), "end asked", 75),
    "STOP by a person": (dict(result=stopped("STOP file")), "end asked", 75),
    "STOP by a person, then notice": (dict(result=stopped("STOP file"), heard={"USR1"}), "end asked", 75),
    "stop_at": (dict(result=stopped("run.stop_at=7")), "end asked", 75),
    "max_time": (dict(result=stopped("run.max_time")), "end asked", 75),
    "out of memory": (dict(result=failed("out_of_memory"), code=1), "end failed", 12),
    "out of memory near the limit": (dict(result=failed("out_of_memory"), code=1, heard={"USR1"}), "end failed", 12),
    "bad config": (dict(result=failed("bad_config"), code=1), "end failed", 2),
    "bad config, before the run was opened": (dict(result={}, code=2), "end failed", 2),
    "not finite": (dict(result=failed("non-finite: 11 steps in a row"), code=1), "end failed", 1),
    "an exception": (dict(result=failed("RuntimeError: x"), code=1), "again died", 1),
    "a rank was killed": (dict(result={"status": "running"}, code=137), "again died", 1),
    "a rank was killed before it began": (dict(result={}, code=1), "again died", 1),
    "a person's STOP, then it died": (dict(result={"status": "running"}, asked="STOP file", code=1), "end asked", 1),
    "a node is lost": (dict(result={"status": "running"}, code=1, lost=True), "requeue lost node", 1),
    "the step alone is ended": (dict(result=stopped(STOP_TERM)), "end asked", 75),
    "by a lost node's srun": (dict(result=stopped(STOP_TERM), restart=1, facts={"Restarts": "1"}), "again died", 75),
    "cut off from Slurm": (dict(result={"status": "running"}, code=1, facts=None), "end unreachable", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_decisions(case):
    given, expected, code = CASES[case]
    given = {"asked": None, "code": 0, "heard": set(), "facts": {}, **given}
    given["facts"] = {} if given["facts"] is None else RUNNING | given["facts"]
    verdict = slurm.judge(**given)
    action, _, cause = expected.partition(" ")
    assert (verdict.action, verdict.code) == (action, code)
    assert verdict.cause == (cause or verdict.cause)


@pytest.fixture
def job(monkeypatch, tmp_path):
    """A run directory inside of Slurm job 7, and what the batch script would do there."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    cfg = job_config("hardware=cpu", "slurm.max_requeues=2", f"run.root={tmp_path}", "run.name=r")
    run = RunDir(tmp_path / "r")
    return run, slurm.freeze(cfg, run)


def commit(run: RunDir, step: int) -> None:
    run.checkpoint(step).mkdir()
    (run.checkpoint(step) / "manifest.json").touch()


def one_launch(
    job, *, heard: set[str] = frozenset(), status: str = "running", reason: str | None = None
) -> slurm.Verdict:
    run, arguments = job
    assert slurm.begin(arguments)
    run.write_result(status, run.last_attempt() + 1, reason=reason)
    return slurm.settle(run, code=1, heard=set(heard), facts=RUNNING)


def test_arguments_of_the_ranks(job):
    run, arguments = job
    path, processes, port, neutral, *words = slurm.begin([*arguments, "--step", "best", "--accept"])
    assert (path, processes) == (str(run.path), "1")
    assert Path(neutral).is_file()
    assert 10000 <= int(port) < 31000
    assert words == [
        *arguments,
        "--step",
        "best",
        "--accept",
        "run.name=r",
        "hardware.nodes=2",
        "hardware.devices_per_node=1",
    ]
    _, _, other, _, *words = slurm.begin([*arguments, "--step", "best", "--accept"])
    assert other != port, "processes of an earlier launch must not meet this one's"
    assert {"--step", "best", "--accept"} <= set(words), "the first launch ended before an attempt began"
    run.write_result("running", 1)
    commit(run, 10)
    *_, last = words = slurm.begin([*arguments, "--step", "best", "--accept"])
    assert last == "hardware.devices_per_node=1"
    assert not {"--step", "best", "--accept"} & set(words), "a second launch goes on from the newest checkpoint"


def test_more_ranks_than_samples_are_bad_config(job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "999")
    with pytest.raises(config.ConfigError, match=r"999 nodes x 1 processes for train\.global_batch_size="):
        slurm.begin(job[1])


@pytest.mark.parametrize(
    ("said", "over"), [("Invalid job id specified", True), ("Unable to contact controller", False)]
)
def test_a_controller_that_does_not_answer_is_no_end(job, monkeypatch, said, over):
    run, arguments = job
    assert slurm.begin(arguments)

    def call(*_: str) -> str:
        raise slurm.SlurmError(f"scontrol show job -o 7: {said}")

    monkeypatch.setattr(slurm, "call", call)
    assert slurm.state(run)["over"] == over
    row = {"state": "running", "owner": "elsewhere"}
    assert slurm.standing(run, row)["state"] == ("died" if over else "running")


def test_two_attempts_without_a_checkpoint_end_it(job):
    run, _ = job
    assert one_launch(job).action == "again"
    commit(run, 10)  # so the first one got somewhere
    assert one_launch(job).action == "again"
    verdict = one_launch(job, status="failed", reason="ValueError: x")
    assert verdict.action == "end"
    assert verdict.reason == (
        "no-progress: 2 attempts in a row ended without a new checkpoint (the newest is step 10). The last one: ValueError: x."
    )
    assert run.result()["status"] == "failed"
    assert run.result()["reason"].startswith("no-progress")


def test_any_rank_may_say_why_it_failed(job):
    """A rank that is not the main process is out of memory; the main one is ended before it can write anything."""
    run, arguments = job
    assert slurm.begin(arguments)
    run.write_result("running", 1)
    run.event("failure", attempt=1, rank=1, reason="out_of_memory")
    verdict = slurm.settle(run, code=1, heard=set(), facts=RUNNING)
    assert (verdict.action, verdict.code) == ("end", 12)
    assert (run.result()["status"], run.result()["reason"]) == ("failed", "out_of_memory")


def test_preemptions_without_a_checkpoint_do_not_count(job):
    facts = {**RUNNING, "PreemptTime": "2026-01-01T00:00:00"}
    for _ in range(5):
        assert slurm.begin(job[1])
        assert slurm.settle(job[0], code=0, heard=set(), facts=facts).action == "requeue"


def test_time_outs_are_counted(job):
    run, _ = job
    for step in (1, 2):
        commit(run, step)
        assert one_launch(job, heard={"USR1"}, status="stopped", reason=STOP_USR1).action == "requeue"
    commit(run, 3)
    verdict = one_launch(job, heard={"USR1"}, status="stopped", reason=STOP_USR1)
    assert (verdict.action, verdict.code) == ("end", 75)
    assert "slurm.max_requeues=2" in verdict.reason
    assert run.result()["status"] == "stopped"


def test_saves_that_outlast_every_notice_are_counted(job, monkeypatch):
    """The script's alarm requeues it, and `settle` is never reached."""
    run, arguments = job
    for restart in (0, 1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert slurm.begin(arguments)
        for name in ("USR1", "ALRM", "TERM"):
            slurm.stop(run, name)
        commit(run, 10 + restart)  # each brings something
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(rundir.RunError, match=r"max_requeues=2 time-outs are used up"):
        slurm.begin(arguments)


def test_nodes_that_die_twice_without_a_word_end_it(job, monkeypatch):
    run, arguments = job
    for restart in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        assert slurm.begin(arguments)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(rundir.RunError, match="no-progress"):
        slurm.begin(arguments)
    assert run.result()["status"] == "failed"


def test_a_start_that_takes_longer_than_the_notice_ends_it(job, monkeypatch):
    """The script requeued it in time, but a run that never gets to a step would go on so for ever."""
    run, arguments = job
    for restart in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        assert slurm.begin(arguments)
        for name in ("USR1", "ALRM", "TERM", "TERM"):
            slurm.stop(run, name)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(rundir.RunError, match="no-progress"):
        slurm.begin(arguments)


def test_a_persons_stop_between_two_allocations_holds(job):
    run, arguments = job
    run.stop.touch()
    assert slurm.begin(arguments), "left over from before this job"
    assert not run.stop.exists()
    run.ask_to_stop(STOP_USR1)
    commit(run, 1)
    assert slurm.begin(arguments), "our own notice"
    commit(run, 2)
    run.stop.touch()
    with pytest.raises(rundir.RunError, match="STOP file") as error:
        slurm.begin(arguments)
    assert error.value.code == 75


def test_a_stop_while_it_waits_in_the_queue_holds(job):
    run, arguments = job
    run.event("submit", job="7", slurm="cluster")
    run.ask_to_stop("no longer needed")
    os.utime(run.stop, (time.time() + 1, time.time() + 1))
    with pytest.raises(rundir.RunError, match="not started again: no longer needed"):
        slurm.begin(arguments)


def test_the_last_word_of_a_lost_node_is_not_heard(job, monkeypatch):
    """On a node that was cut off, Slurm ends the old job's processes when it is back; the run goes on elsewhere."""
    run, _ = job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = rundir.Lock.acquire(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    slurm.stop(run, "TERM")
    assert not run.stop.exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    slurm.stop(run, "TERM")
    assert run.stop_reason() == STOP_TERM
    lock.release()


def test_queued_runs_keep_their_code_and_config(job):
    run, arguments = job
    frozen = (run.code / "train" / "main.py").read_text()
    assert frozen == (slurm.CHECKOUT / "train" / "main.py").read_text()
    assert not list(run.code.rglob("__pycache__")) + list(run.code.rglob("local"))
    cfg = config.load(arguments[1])
    assert (cfg.run.root, cfg.run.name) == (str(run.path.parent), "r")


def test_without_slurm_it_says_what_else_there_is(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.SlurmError, match="slurm=devcluster"):
        slurm.call("cluster", "squeue")
    monkeypatch.setenv("GEARSHIFT_DEVCLUSTER", "/nowhere")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with pytest.raises(slurm.SlurmError, match="devcluster start"):
        slurm.call("devcluster", "squeue")


# ------------------------------------------------------------------------------------------------------ on real daemons


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.start("--nodes", "12", "--gpus", "8", "--cpus", "64", "--mem", "600000") as running:
        yield running


@pytest.fixture
def free(cluster, monkeypatch):
    """A cluster without jobs, to which this process submits."""
    for key in ("PATH", "SLURM_CONF", "GEARSHIFT_DEVCLUSTER"):
        monkeypatch.setenv(key, cluster.env[key])
    cluster.idle()
    return cluster


class Job:
    """A run of the stand-in, submitted as `gearshift run` does."""

    def __init__(self, cluster: Cluster, root: Path, *overrides: str, **plan: object) -> None:
        self.cluster, self.run = cluster, RunDir(root / "r")
        self.steps = plan.setdefault("steps", 60)
        root.mkdir(exist_ok=True)
        python = slurm_cluster.standin(root, **plan)
        cfg = config.compose(["slurm=devcluster", "slurm.time=60", "hardware=cpu", "tracker=none", *overrides])
        cfg = replace(cfg, run=replace(cfg.run, root=str(root), name="r"))
        cfg = replace(cfg, slurm=replace(cfg.slurm, setup=[f"python={shlex.quote(str(python))}"]))
        slurm.submit(cfg, self.run, say=lambda _: None)
        self.id = slurm.state(self.run)["job"]

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.id)["NodeList"]).split()

    def at(self, step: int) -> None:
        """Wait for a step."""
        wait_for(lambda: any(line["step"] >= step for line in rundir.read_jsonl(self.run.ledger)), 40, self.log)

    def ends(self, code: int, timeout: float = 60) -> dict:
        """Wait for the end; the exit code of the batch script, and the result."""
        facts = self.cluster.wait(self.id, timeout=timeout)
        assert facts["ExitCode"].partition(":")[0] == str(code), (facts, self.log())
        return self.run.result()

    def attempts(self) -> list[tuple[int, int]]:
        """(first step, last step) of each attempt."""
        lines = rundir.read_jsonl(self.run.ledger)
        numbers = sorted({line["attempt"] for line in lines})
        steps = [[line["step"] for line in lines if line["attempt"] == number] for number in numbers]
        return [(min(each), max(each)) for each in steps]

    def whole(self) -> None:
        """Nothing was lost: the last attempt ended in the state of an unbroken run."""
        result = self.run.result()
        assert (result["status"], result["state_hash"]) == ("finished", final_state(self.steps)), self.log()

    def kinds(self, kind: str, field: str) -> list:
        return [event[field] for event in rundir.read_jsonl(self.run.events) if event["kind"] == kind]

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.run.logs.glob("slurm-*.log"))


@pytest.mark.slurm
@pytest.mark.parametrize("name", JOBS)
def test_slurm_takes_the_texts(free, name, tmp_path):
    free.run("scontrol", "create", "partitionname=gpu", "nodes=ALL", check=False)
    overrides = [word.replace("a100:", "").replace("slurm.qos=long", "slurm.qos=null") for word in JOBS[name]]
    script = tmp_path / "job.sbatch"
    script.write_text(slurm.render(job_config(*overrides), RunDir(tmp_path / "r"), []))
    done = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if name == "many_nodes":
        assert "node[1-8]" in done.stderr


@pytest.mark.slurm
def test_a_job_in_a_hostile_place_runs_to_its_end(free, tmp_path):
    root = tmp_path / "a b'\"$(touch OWNED);&#%j"
    root.mkdir()
    job = Job(free, root, "hardware.nodes=2", steps=5)
    assert job.ends(0)["steps"] == 5
    assert job.attempts() == [(1, 5)]
    assert list(job.run.logs.glob("slurm-*.log"))
    assert not list(tmp_path.rglob("OWNED")) + list(Path.cwd().glob("OWNED"))


@pytest.mark.slurm
@pytest.mark.slow
def test_three_notices_cost_no_step(free, tmp_path):
    job = Job(free, tmp_path, "hardware.nodes=2", every=1000, steps=80)
    for restart, step in enumerate((10, 30, 50)):
        job.at(step)
        free.run("scancel", "-s", "USR1", "--batch", job.id)
        wait_for(lambda n=restart: int(free.job(job.id)["Restarts"]) > n, 40, job.log)
    job.ends(0)
    job.whole()
    attempts = job.attempts()
    assert len(attempts) == 4
    assert all(after[0] == before[1] + 1 for before, after in pairwise(attempts))
    assert job.kinds("settle", "cause") == ["time limit"] * 3 + ["finished"]


@pytest.mark.slurm
def test_preemption_costs_no_step(free, tmp_path):
    """Without grace, with grace, and in a partition whose preempted jobs are cancelled; all at once."""
    partitions = ["preempt", "grace", "cancel"]
    options = ["hardware.nodes=4", "slurm.cpus_per_task=64"]
    jobs = [Job(free, tmp_path / p, f"slurm.partition={p}", *options, every=1000) for p in partitions]
    for job in jobs:
        job.at(10)
    free.run("srun", "-N12", "-c64", "true")
    for job in jobs:
        wait_for(lambda j=job: free.job(j.id)["Restarts"] == "1", 40, job.log)
        job.ends(0)
        job.whole()
        (_, last), (first, _) = job.attempts()
        assert first == last + 1


@pytest.mark.slurm
def test_scancel_saves_and_is_final(free, tmp_path):
    job = Job(free, tmp_path, "hardware.nodes=2", every=1000)
    job.at(10)
    free.run("scancel", job.id)
    facts = free.wait(job.id)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert job.run.result()["status"] == "stopped"
    assert slurm.newest(job.run) == job.attempts()[0][1]


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("how", "override"),
    [("stop_at", "run.stop_at=7"), ("STOP file", "run.stop_at=null"), ("late STOP file", "run.stop_at=null")],
)
def test_a_person_stops_it(free, tmp_path, how, override):
    job = Job(free, tmp_path, override, every=1000, import_s=3 if how.startswith("late") else 0)
    if how == "late STOP file":
        wait_for(lambda: job.kinds("launch", "step"), 20)
        job.run.stop.touch()
    elif how == "STOP file":
        job.at(5)
        job.run.stop.touch()
    assert job.ends(75)["status"] == "stopped"
    assert free.job(job.id)["Restarts"] == "0"


@pytest.mark.slurm
def test_a_signal_while_it_imports_and_while_it_saves(free, tmp_path):
    job = Job(free, tmp_path, every=1000, steps=30, import_s=2, save_s=2)
    for restart in (0, 1):
        wait_for(lambda n=restart: len(job.kinds("launch", "step")) > n, 20, job.log)
        if restart == 0:  # while it imports: the first step is done and saved
            free.run("scancel", "-s", "USR1", "--batch", job.id)
        else:  # three times, so that some arrive while it saves
            job.at(5)
            for _ in range(3):
                free.run("scancel", "-s", "USR1", "--batch", job.id)
                time.sleep(0.5)
        wait_for(lambda n=restart: int(free.job(job.id)["Restarts"]) > n, 40, job.log)
    job.ends(0)
    job.whole()
    attempts = job.attempts()
    assert attempts[0] == (1, 1)
    assert attempts[2][0] == attempts[1][1] + 1


@pytest.mark.slurm
def test_a_crash_is_started_again_in_the_same_allocation(free, tmp_path):
    job = Job(free, tmp_path, "hardware.nodes=2", every=10)
    job.at(15)
    victim = [pid for pid in slurm_cluster.standins(tmp_path) if _nodeid(pid) == "0"]
    os.kill(victim[0], 9)
    job.ends(0)
    job.whole()
    assert job.attempts()[1][0] == 11
    assert free.job(job.id)["Restarts"] == "0"


def _nodeid(pid: int) -> str | None:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((word.partition(b"=")[2].decode() for word in words if word.startswith(b"SLURM_NODEID=")), None)


@pytest.mark.slurm
def test_a_crash_loop_ends_with_a_reason(free, tmp_path):
    job = Job(free, tmp_path, every=10, die_at=15)
    result = job.ends(1)
    assert result["status"] == "failed"
    assert result["reason"].startswith(
        "no-progress: 2 attempts in a row ended without a new checkpoint (the newest is step 10)"
    )
    assert job.attempts() == [(1, 15), (11, 15), (11, 15)]
    assert "gearshift resume" in job.log()


@pytest.mark.slurm
@pytest.mark.parametrize(("reason", "code"), [("out_of_memory", 12), ("bad_config", 2), ("non-finite: 11 steps", 1)])
def test_what_would_only_repeat_ends_at_once(free, tmp_path, reason, code):
    job = Job(free, tmp_path, fail_at=3, fail_reason=reason)
    assert job.ends(code)["reason"] == reason
    assert job.attempts() == [(1, 3)]


@pytest.mark.slurm
def test_a_dead_node_costs_less_than_an_interval(free, tmp_path):
    """The first node of a job, where its script runs, or the second; with a last word or without; all at once."""
    faults = [(verb, which) for verb in ("kill", "poweroff") for which in (0, 1)]
    apart = ["hardware.nodes=2", "slurm.cpus_per_task=64"]  # whole nodes, so that a fault is one job's
    jobs = [Job(free, tmp_path / f"{v}-{w}", *apart, steps=300 if w else 60) for v, w in faults]
    for job, (verb, which) in zip(jobs, faults, strict=True):
        job.at(25)
        free.tool("node", verb, job.nodes()[which])
    for job in jobs:
        wait_for(lambda j=job: int(free.job(j.id)["Restarts"]) == 1, 60, job.log)
    for job in jobs:
        job.ends(0, timeout=120)
        job.whole()
        (_, last), (first, _) = job.attempts()
        assert last - first < 10


@pytest.mark.slurm
@pytest.mark.slow
def test_a_cut_node_does_not_write_into_the_run_that_went_on(free, tmp_path):
    job = Job(free, tmp_path, every=10, steps=400)
    job.at(15)
    node = free.job(job.id)["NodeList"]
    free.tool("node", "cut", node)
    wait_for(lambda: len(job.attempts()) == 2, 90, job.log)  # goes on elsewhere
    first = job.attempts()[1][0]
    lost = [event for event in rundir.read_jsonl(job.run.events) if event["kind"] == "launch"]
    assert len(lost) == 2
    free.tool("node", "heal", node)  # Slurm now ends the old processes
    job.ends(0, timeout=120)
    job.whole()
    attempts = job.attempts()[1:]  # the old srun may have ended the new job's step of the same number, not the job
    assert all(after[0] == before[1] + 1 for before, after in pairwise(attempts))
    assert first > 1


@pytest.mark.slurm
def test_it_shrinks_and_grows_with_what_is_granted(free, tmp_path):
    four = "slurm.extra=['--exclude=node[5-12]']"
    job = Job(free, tmp_path, "hardware.nodes=2-4", four, every=5, steps=100)
    job.at(5)
    nodes = job.nodes()
    assert len(nodes) == 4
    for node in nodes[2:]:
        free.tool("node", "kill", node)
    free.run("scontrol", "update", f"nodename={','.join(nodes[2:])}", "state=down", "reason=test")
    wait_for(lambda: job.kinds("resume", "nodes") == ["2"], 60, job.log)
    for node in nodes[2:]:
        free.tool("node", "start", node)
    wait_for(lambda: len(free.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle").splitlines()) == 10, 30)
    free.run("scancel", "-s", "USR1", "--batch", job.id)
    wait_for(lambda: job.kinds("resume", "nodes") == ["2", "4"], 40, job.log)
    job.ends(0, timeout=120)
    job.whole()
    assert job.kinds("launch", "nodes") == [4, 2, 4]


@pytest.mark.slurm
@pytest.mark.slow
def test_a_real_time_limit(free, tmp_path):
    """Slurm looks at limits every 30 s, so one takes a minute or two."""
    job = Job(free, tmp_path, "slurm.time=1", "slurm.signal_s=10", every=10000, steps=900)
    wait_for(lambda: free.job(job.id)["Restarts"] == "1", 120, job.log)
    job.ends(0, timeout=200)
    job.whole()
    attempts = job.attempts()
    assert all(after[0] == before[1] + 1 for before, after in pairwise(attempts))


@pytest.mark.slurm
def test_a_run_is_queued_once_and_a_finished_one_stays(free, tmp_path):
    job = Job(free, tmp_path, steps=8)
    cfg = replace(config.load(job.run.code / "config.yaml"), run=config.RunConfig(root=str(tmp_path), name="r"))
    with pytest.raises(slurm.SlurmError, match=f"as Slurm job {job.id}"):
        slurm.submit(cfg, job.run)
    assert slurm.standing(job.run, {"state": "new"})["owner"].startswith(f"Slurm job {job.id}")
    job.ends(0)
    assert slurm.standing(job.run, {"state": "finished"}) == {"state": "finished"}
    assert slurm.state(job.run)["over"]
    assert slurm.submit(cfg, job.run, say=lambda _: None, wait=True) == 0
    assert job.attempts() == [(1, 8)], "nothing was started for a finished run"


@pytest.mark.slurm
def test_by_hand(free, tmp_path):
    """`sbatch slurm/train.sbatch` with overrides: prepared in the job."""
    python = slurm_cluster.standin(tmp_path, steps=5)
    words = ["experiment=lm_stdlib", "hardware=cpu", "tracker=none", f"run.root={tmp_path}", "run.name=r"]
    words += [f"data.cache_dir={tmp_path}/cache"]
    environment = {"python": str(python), "PYTHONPATH": str(slurm.CHECKOUT)}
    log = tmp_path / "log"
    command = ["sbatch", "--parsable", "-o", log, "-D", tmp_path, slurm.SCRIPT, *words, "oops=1"]
    bad = subprocess.run(
        command, env={**free.env, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert free.wait(bad)["ExitCode"] == "2:0"
    assert "oops" in log.read_text()
