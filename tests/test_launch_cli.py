"""The `gearshift` command as a user types it: what it refuses, what it shows, and whole runs with their exit codes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from train import describe, rundir
from train.rundir import RunDir

GEARSHIFT = [sys.executable, "-m", "launch"]
WITHOUT_TORCH = [
    sys.executable,
    "-c",
    "import sys\n"
    "for name in ('torch', 'transformers', 'accelerate', 'deepspeed', 'wandb'): sys.modules[name] = None\n"
    "from launch.cli import main; main()",
]
"""The same command in a process where importing a heavy library is an error."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small files to train on, and a cache beside them that the tests of this module share."""
    root = tmp_path_factory.mktemp("text")
    for number in range(20):
        lines = (f"def f_{number}_{line}(x):\n    return x + {line * number}\n" for line in range(40))
        (root / f"file_{number}.py").write_text("\n".join(lines))
    return root


Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def settings(text: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run that takes a second, but for imports."""
    return [
        *("hardware=cpu", f"data.path={text}", f"data.cache_dir={text.parent}/cache", "data.tokenizer=bytes"),
        *("data.seq_len=32", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "optim.warmup_steps=0"),
        *("train.global_batch_size=4", "train.max_steps=6", "train.precision=fp32", "tracker=none", "log.every=1"),
        *("eval.every=null", "eval.max_samples=4", "eval.samples=0", f"run.root={tmp_path}/runs", "run.name=r"),
    ]


@pytest.fixture
def gearshift(tmp_path: Path, monkeypatch) -> Command:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)

    def call(*words: object, command: list[str] = GEARSHIFT) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=240)

    return call


def cpu_s() -> float:
    """CPU seconds of all commands so far: on an idle machine the time that a user waits, and steady on a busy one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ------------------------------------------------------------------------------------------- start-up and refusals


def test_help_is_quick_and_imports_nothing_heavy(gearshift: Command) -> None:
    before = cpu_s()
    shown = gearshift("--help", command=WITHOUT_TORCH)
    assert cpu_s() - before < 2
    assert shown.returncode == 0
    assert "75 stopped and saved" in shown.stdout


def test_a_config_error_says_everything_at_once_without_torch(gearshift: Command) -> None:
    before = cpu_s()
    wrong = gearshift("run", "optim.lrr=1", "train.global_batch_size=-3", "experiment=lm_stdlb", command=WITHOUT_TORCH)
    assert cpu_s() - before < 3
    assert wrong.returncode == 2
    for part in ("optim.lr", "train.global_batch_size", "lm_stdlib"):
        assert part in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert wrong.stdout == ""


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["rum"], "'run'"),
        (["run", "--fool"], "--fool"),
        (["resume"], "RUN"),
        (["resume", "nowhere"], "nowhere is not a run directory"),
        (["resume", "nowhere", "--step", "newest"], "--step newest"),
        (["run", "run.name=../escape"], "run.name"),
        (["run", "--plugin", "no_such_module"], "no_such_module"),
        (["run", "--config-dir", "no_such_dir"], "no_such_dir"),
        (["run", "hardware=nodes_2x8x80gb", "hardware.device=cpu"], "hardware.nodes"),
        (["run", "data.path=no/such/file"], "no/such/file"),
        (["prepare", "data.path=no/such/file"], "no/such/file"),
    ],
)
def test_refusals_name_what_was_given_and_leave_nothing(
    gearshift: Command, tmp_path: Path, settings: list[str], words: list[str], part: str
) -> None:
    base = settings if words[0] in ("run", "prepare") else []
    wrong = gearshift(words[0], *base, *words[1:], command=WITHOUT_TORCH)
    assert wrong.returncode == 2, wrong.stderr
    assert part in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_everything_starts_nothing_and_is_deterministic(
    gearshift: Command, tmp_path: Path, settings: list[str]
) -> None:
    first = gearshift("run", *settings, "--dry-run", command=WITHOUT_TORCH)
    second = gearshift("run", "--dry-run", *settings, command=WITHOUT_TORCH)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    for part in ("global_batch_size: 4", "# math_hash ", "# exec_hash ", "OMP_NUM_THREADS=", "--num_processes 1"):
        assert part in first.stdout
    assert f"--config {tmp_path}/runs/r/config.yaml" in first.stdout
    assert not (tmp_path / "runs").exists()
    other = gearshift("run", *settings, "--dry-run", "strategy=ddp", command=WITHOUT_TORCH)
    lines = dict(line.split()[1:3] for line in first.stdout.splitlines() if line.startswith("# "))
    changed = dict(line.split()[1:3] for line in other.stdout.splitlines() if line.startswith("# "))
    assert changed["math_hash"] == lines["math_hash"]
    assert changed["exec_hash"] != lines["exec_hash"]


def test_a_dry_run_for_slurm_shows_the_batch_script(gearshift: Command, settings: list[str], monkeypatch) -> None:
    shown = gearshift("run", *settings, "slurm=cluster", "slurm.partition=short", "--dry-run", command=WITHOUT_TORCH)
    assert shown.returncode == 0, shown.stderr
    assert "#SBATCH --partition=short" in shown.stdout
    monkeypatch.setenv("PATH", "")
    submitted = gearshift("run", *settings, "slurm=cluster", command=WITHOUT_TORCH)
    assert submitted.returncode == 1
    assert "sbatch is not on the PATH" in submitted.stderr


def test_without_a_name_the_directory_is_named_by_experiment_and_hash(gearshift: Command, settings: list[str]) -> None:
    shown = gearshift("run", *settings, "run.name=null", "--dry-run")
    lines = dict(line.split()[1:3] for line in shown.stdout.splitlines() if line.startswith("# "))
    assert Path(lines["run"]).name == f"lm_stdlib-{lines['math_hash'][:8]}"


def test_prepare_shows_three_samples(gearshift: Command, settings: list[str]) -> None:
    shown = gearshift("prepare", *settings, command=WITHOUT_TORCH)
    assert shown.returncode == 0, shown.stderr
    assert "return x" in shown.stdout
    assert "train_samples" in shown.stdout


def test_a_run_in_use_is_refused_and_its_owner_named(gearshift: Command, tmp_path: Path, settings: list[str]) -> None:
    run = RunDir(tmp_path / "runs" / "r")
    lock = rundir.Lock.acquire(run)
    refused = gearshift("run", *settings, command=WITHOUT_TORCH)
    assert refused.returncode == 1
    assert f"process {os.getpid()} on" in refused.stderr
    assert not run.config.exists()
    lock.release()


# ------------------------------------------------------------------------------------------------------------ status


def test_status_tells_runs_apart(gearshift: Command, tmp_path: Path) -> None:
    assert gearshift("status", command=WITHOUT_TORCH).returncode == 1
    for name, result in (("done", "finished"), ("dead", "running"), ("sweep/000", "stopped"), ("live", "running")):
        run = RunDir(tmp_path / "runs" / name).create()
        run.config.write_text("seed: 0\n")
        run.write_result(result, 1, reason="run.stop_at=3" if result == "stopped" else None, steps=3)
        rundir.append_line(run.metrics, {"step": 3, "loss": 1.25})
    lock = rundir.Lock.acquire(run)
    shown = gearshift("status", command=WITHOUT_TORCH)
    assert shown.returncode == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines()}
    assert "finished" in lines["runs/done"]
    assert "died" in lines["runs/dead"]
    assert "stopped" in lines["runs/sweep/000"]
    assert "run.stop_at=3" in lines["runs/sweep/000"]
    assert f"process {os.getpid()}" in lines["runs/live"]
    assert "loss 1.2500" in lines["runs/live"]
    one = json.loads(gearshift("status", "runs/dead", "--json").stdout)
    assert (one["state"], one["newest"]["step"]) == ("died", 3)
    assert len(json.loads(gearshift("status", "--json").stdout)) == 4
    lock.release()


def test_status_tells_how_far_a_run_is_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "alive", lambda owner: True)
    run = RunDir(tmp_path / "r").create()
    run.event("start", attempt=1, step=0, total_steps=100)
    run.write_result("running", 1)
    rundir.append_line(run.metrics, {"step": 40, "loss": 2.0, "step_s": 0.5})
    row = describe.standing(run)
    assert row["eta_s"] == 30
    text = "  ".join(describe.standing_text(row))
    assert "step 40/100  eta 0:00:30  loss 2.0000" in text
    assert "resume" not in text
    run.write_result("stopped", 1, steps=40, reason="run.stop_at=40")
    assert f"run.stop_at=40  gearshift resume {run.path}" in "  ".join(describe.standing_text(describe.standing(run)))


# -------------------------------------------------------------------------------------------------------- whole runs


def result_of(run: RunDir) -> dict:
    result = run.result()
    assert result is not None
    return result


def started(words: list[str], run: RunDir, step: int) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """`gearshift run` once it has trained up to `step`, and every process below it."""
    with open("stderr.txt", "w") as told:
        process = subprocess.Popen([*GEARSHIFT, "run", *words], stdout=subprocess.DEVNULL, stderr=told)
    while (rundir.last_record(run.metrics) or {"step": 0})["step"] < step:
        assert process.poll() is None, Path("stderr.txt").read_text()
        time.sleep(0.02)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.pulse
def test_stopped_resumed_finished_shown_and_trained_longer(
    gearshift: Command, tmp_path: Path, settings: list[str]
) -> None:
    run = RunDir(tmp_path / "runs" / "r")
    words = [*settings, "train.max_steps=400"]
    process, below = started(words, run, step=5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    stopped = result_of(run)
    assert (stopped["status"], stopped["reason"]) == ("stopped", "signal SIGTERM")
    assert 5 <= stopped["steps"] < 400
    assert not run.stop.exists()
    assert not any(child.is_running() for child in below)

    finished = gearshift("run", *words)
    assert finished.returncode == 0, finished.stderr
    result = result_of(run)
    assert (result["status"], result["steps"], result["attempt"]) == ("finished", 400, 2)
    steps = [row["step"] for row in rundir.read_jsonl(run.metrics)]
    assert steps == list(range(1, 401))  # a graceful stop loses no step, and repeats none

    for again in (["run", *words], ["resume", run.path], ["resume", run.path, "strategy=single", "run.stop_at=3"]):
        before = cpu_s()
        shown = gearshift(*again, command=WITHOUT_TORCH)
        assert cpu_s() - before < 5
        assert shown.returncode == 0, shown.stderr
        assert "r: finished" in shown.stdout
    assert result_of(run) == result

    other = gearshift("run", *settings, "train.max_steps=402", command=WITHOUT_TORCH)
    assert other.returncode == 2
    assert "train.max_steps: 400 -> 402" in other.stderr
    assert f"gearshift resume {run.path} train.max_steps=402 --accept" in other.stderr
    accepted = gearshift("resume", run.path, "train.max_steps=402", "--accept")
    assert accepted.returncode == 0, accepted.stderr
    assert result_of(run)["steps"] == 402
    (event,) = [event for event in rundir.read_jsonl(run.events) if event["kind"] == "math_changed"]
    assert event["changes"] == ["train.max_steps: 400 -> 402"]


@pytest.mark.pulse
@pytest.mark.ranks
def test_a_stopped_run_goes_on_elsewhere_on_another_number_of_processes(
    gearshift: Command, tmp_path: Path, settings: list[str]
) -> None:
    run, moved = RunDir(tmp_path / "runs" / "r"), RunDir(tmp_path / "elsewhere" / "copy")
    stopped = gearshift("run", *settings, "hardware.devices_per_node=2", "run.stop_at=3")
    assert stopped.returncode == 75, stopped.stderr
    result = result_of(run)
    assert (result["reason"], result["engine"]["world_size"]) == ("run.stop_at=3", 2)
    moved.path.parent.mkdir()
    run.path.rename(moved.path)
    finished = gearshift("resume", moved.path, "hardware=cpu")  # the limit of the first command does not hold any more
    assert finished.returncode == 0, finished.stderr
    after = result_of(moved)
    assert (after["steps"], after["engine"]["world_size"], after["math_hash"]) == (6, 1, result["math_hash"])
    assert not run.path.exists()


@pytest.mark.pulse
@pytest.mark.ranks
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killing_gearshift_leaves_no_orphans(
    gearshift: Command, tmp_path: Path, settings: list[str], processes: int
) -> None:
    run = RunDir(tmp_path / "runs" / "r")
    words = [*settings, "train.max_steps=100000", f"hardware.devices_per_node={processes}"]
    process, below = started(words, run, step=3)
    assert len(below) >= 1 + processes
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(below, timeout=20)
    assert not left
    assert result_of(run)["status"] == "stopped"  # they saved before they left


@pytest.mark.pulse
@pytest.mark.ranks
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_rank_is_started_again_from_the_last_commit(
    gearshift: Command, tmp_path: Path, settings: list[str], processes: int
) -> None:
    run = RunDir(tmp_path / "runs" / "r")
    words = [*settings, "train.max_steps=400", "checkpoint.every=50", "run.max_restarts=1"]
    process, below = started([*words, f"hardware.devices_per_node={processes}"], run, step=120)
    below[-1].kill()
    assert process.wait(120) == 0
    assert result_of(run)["attempt"] == 2
    (resumed,) = [event for event in rundir.read_jsonl(run.events) if event["kind"] == "resume"]
    assert resumed["step"] >= 100
    assert "each used exactly once" in gearshift("verify", run.path, command=WITHOUT_TORCH).stdout
