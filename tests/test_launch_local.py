"""The local launcher: explicit flags, answers to signals, no orphans, and the exit code of the contract.

Most tests supervise a small script that behaves towards its run directory as training does; `test_launch_cli.py` has
the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import local
from train import config
from train.config import Config, ConfigError
from train.rundir import Lock, RunDir

REPOSITORY = Path(__file__).parent.parent

RANK = """
import os, signal, subprocess, sys, time
from train.rundir import Lock, RunDir
run, what = RunDir(sys.argv[1]), sys.argv[2]
if what == "nothing":
    sys.exit(3)
lock = Lock.acquire(run)
run.write_result("running", lock.attempt)
def leave(status, code=0, reason=None):
    run.write_result(status, lock.attempt, reason=reason)
    lock.release()
    os._exit(code)
if what == "finish":
    leave("finished")
if what == "abort":  # the result is on disk, then the interpreter dies while it leaves
    run.write_result("finished", lock.attempt)
    os.abort()
if what == "die_once" and lock.attempt > 1:
    leave("finished")
if what == "save_and_die":
    run.checkpoint(lock.attempt).mkdir()
    (run.checkpoint(lock.attempt) / "manifest.json").touch()
if what.startswith("oom_elsewhere"):
    run.event("oom", attempt=lock.attempt, rank=1, reason="out_of_memory")
if what == "oom_elsewhere:fail":
    leave("failed", 1, run.failure(lock.attempt, "RuntimeError: connection closed"))
if what in ("die", "die_once", "save_and_die", "oom_elsewhere:die"):
    os.kill(os.getpid(), signal.SIGKILL)
if what.startswith("fail:"):
    leave("failed", 1, what[5:])
if what == "orphan":  # a launcher that dies and leaves a rank behind
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    code += "print('rank', flush=True); time.sleep(100)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
    if what == "polite":  # saves and leaves on the signal itself, as training does
        signal.signal(number, lambda n, f: leave("stopped", reason=signal.Signals(n).name))
    else:
        signal.signal(number, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
while run.stop_reason() is None or what == "deaf":
    time.sleep(0.02)
leave("stopped", reason=run.stop_reason())
"""

SUPERVISOR = """
import json, sys
from launch.local import Launch, supervise
from train.rundir import RunDir
command, restarts, path = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.exit(supervise(Launch(command, {}, restarts), RunDir(path), lambda text: print(text, flush=True)))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def start(run: RunDir, what: str, restarts: int = 0) -> subprocess.Popen:
    """A supervisor of one script, as a process of its own."""
    rank = json.dumps([sys.executable, "-c", RANK, str(run.path), what])
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, rank, str(restarts), str(run.path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
    )


def ready(supervisor: subprocess.Popen) -> int:
    """Wait until the script runs; its process id."""
    assert supervisor.stdout is not None
    word, pid = supervisor.stdout.readline().split()
    assert word == "ready"
    return int(pid)


def gone(pid: int, within_s: float = 5) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def result_of(run: RunDir) -> tuple[str, str | None]:
    result = run.result()
    assert result is not None
    return result["status"], result["reason"]


# ------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("what", "code", "status"),
    [
        ("finish", 0, "finished"),
        ("abort", 0, "finished"),
        ("fail:bad_config", 2, "failed"),
        ("fail:does_not_fit", 3, "failed"),
        ("fail:out_of_memory", 12, "failed"),
        ("fail:nonfinite", 1, "failed"),
        ("die", 1, "failed"),
    ],
)
def test_the_result_is_trusted_before_the_exit_code(run: RunDir, what: str, code: int, status: str) -> None:
    assert start(run, what).wait(30) == code
    assert result_of(run)[0] == status


def test_a_result_of_an_earlier_attempt_is_not_trusted(run: RunDir) -> None:
    run.write_result("stopped", 1, reason="run.stop_at=5")
    assert start(run, "nothing").wait(30) == 1
    run.write_result("finished", 1)
    assert start(run, "nothing").wait(30) == 1


def test_a_start_that_lost_the_race_leaves_the_winners_run_alone(run: RunDir) -> None:
    """Both have seen a free run; one has it by now, and the other's ranks are refused."""
    lock = Lock.acquire(run)
    run.write_result("running", lock.attempt)
    run.ask_to_stop("the winner's")
    assert start(run, "finish", restarts=3).wait(30) == 1
    assert result_of(run) == ("running", None)
    assert run.stop_reason() == "the winner's"
    assert run.last_attempt() == lock.attempt
    lock.release()
    assert start(run, "finish").wait(30) == 0
    assert run.stop_reason() is None


def test_a_death_is_written_down(run: RunDir) -> None:
    start(run, "die").wait(30)
    assert result_of(run) == ("failed", "the ranks died (exit code -9)")


def test_restarts_after_an_unexplained_death_only(run: RunDir) -> None:
    assert start(run, "die_once", restarts=1).wait(30) == 0
    assert run.last_attempt() == 2
    assert start(run, "fail:out_of_memory", restarts=3).wait(30) == 12
    assert run.last_attempt() == 3
    supervisor = start(
        run, "fail:RuntimeError: connection closed", restarts=1
    )  # what a rank says whose peer was killed
    assert supervisor.wait(30) == 1
    assert run.last_attempt() == 5


def test_two_attempts_without_a_new_checkpoint_are_enough(run: RunDir) -> None:
    assert start(run, "die", restarts=5).wait(30) == 1
    assert run.last_attempt() == 2
    assert result_of(run) == (
        "failed",
        "no-progress: 2 attempts in a row ended without a new checkpoint (step 0); the ranks died (exit code -9)",
    )
    assert start(run, "nothing", restarts=5).wait(30) == 1  # dies before an attempt begins
    assert run.last_attempt() == 2
    assert start(run, "save_and_die", restarts=3).wait(30) == 1  # control: each saves before it dies
    assert run.last_attempt() == 6


def test_the_rank_that_knows_most_is_believed_and_ends_the_run(run: RunDir) -> None:
    """Out of memory on one rank is a lost connection to the others; if those are killed, nobody writes the result."""
    for what in ("oom_elsewhere:fail", "oom_elsewhere:die"):
        before = run.last_attempt()
        assert start(run, what, restarts=3).wait(30) == 12
        assert result_of(run) == ("failed", "out_of_memory")
        assert run.last_attempt() == before + 1


@pytest.mark.parametrize(
    ("what", "exit_code", "words"),
    [
        ("save_and_die", 1, "--step 3 --accept;--accept;"),  # what it has saved since is what it goes on from
        # Else later steps that it was to leave would come back.
        ("die_once", 0, "--step 3 --accept;--step 3 --accept;"),
    ],
)
def test_a_restart_goes_on_from_where_it_was(run: RunDir, what: str, exit_code: int, words: str) -> None:
    code = SUPERVISOR.replace("Launch(command", "Launch([*command, '--step', '3', '--accept']")
    command = json.dumps([sys.executable, "-c", RANK + "\n", str(run.path), what])
    seen = run.path / "seen"
    command = command.replace(
        "lock = Lock.acquire(run)", f"open('{seen}', 'a').write(' '.join(sys.argv[3:]) + ';'); lock = Lock.acquire(run)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, "1", str(run.path)], cwd=REPOSITORY, check=False, timeout=30
    )
    assert done.returncode == exit_code
    assert seen.read_text() == words


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_writes_stop_and_the_run_saves(run: RunDir, number: signal.Signals) -> None:
    supervisor = start(run, "wait")
    rank = ready(supervisor)
    supervisor.send_signal(number)
    assert supervisor.wait(30) == 75
    assert result_of(run) == ("stopped", f"signal {number.name}")
    assert gone(rank)
    assert not run.stop.exists()


def test_repeated_signals_change_nothing(run: RunDir) -> None:
    supervisor = start(run, "deaf")
    rank = ready(supervisor)
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
        supervisor.send_signal(number)
        time.sleep(0.05)
    time.sleep(0.3)
    assert supervisor.poll() is None
    assert psutil.pid_exists(rank)
    assert run.stop_reason() == "signal SIGTERM"
    time.sleep(1)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(5) == 1
    assert gone(rank)


def test_a_second_interrupt_a_second_later_leaves_at_once(run: RunDir) -> None:
    supervisor = start(run, "deaf")
    rank = ready(supervisor)
    supervisor.send_signal(signal.SIGINT)
    time.sleep(1.1)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(5) == 1
    assert gone(rank, 1)
    assert result_of(run)[0] == "failed"


def test_a_left_over_stop_is_removed_before_the_start(run: RunDir) -> None:
    run.ask_to_stop("yesterday")
    run.save.touch()
    assert start(run, "finish").wait(30) == 0
    assert not run.stop.exists()
    supervisor = start(run, "wait")
    ready(supervisor)
    run.stop.touch()  # control: one that is written while it runs is heard
    assert supervisor.wait(30) == 75
    assert result_of(run) == ("stopped", "STOP file")


# ------------------------------------------------------------------------------------------------------- no orphans


def test_killing_the_supervisor_ends_the_ranks(run: RunDir) -> None:
    supervisor = start(run, "polite")
    rank = ready(supervisor)
    supervisor.kill()
    assert gone(rank)
    assert result_of(run) == ("stopped", "SIGTERM")


def test_ranks_that_outlive_their_launcher_are_found_and_ended(run: RunDir, monkeypatch) -> None:
    code = SUPERVISOR.replace("sys.exit(", "import launch.local; launch.local.SHUTDOWN_S = 1; sys.exit(")
    rank = json.dumps([sys.executable, "-c", RANK, str(run.path), "orphan"])
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code, rank, "0", str(run.path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == "rank\n"
    orphans = psutil.Process(supervisor.pid).children(recursive=True)
    assert orphans
    assert supervisor.wait(10) == 1
    assert all(gone(orphan.pid) for orphan in orphans)


# ------------------------------------------------------------------------------------ processes, threads, environment


def settings(*overrides: str) -> Config:
    return config.compose(["hardware=cpu", *overrides])


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch) -> None:
    """An `nvidia-smi` that knows two cards, one of them cut into MIG slices."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: B (UUID: y)'\necho '  MIG 1g.10gb'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_all_cards_or_those_that_are_visible_or_one_process(two_cards: None, monkeypatch) -> None:
    auto = config.compose(["hardware=auto"])
    assert local.gpus() == local.world_size(auto) == 2
    for visible, count in (("0", 1), ("0,1", 2), ("0,1,2,3", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("GPU-x", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert local.gpus() == count, visible
        assert local.world_size(auto) == max(1, count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local.world_size(settings()) == 1
    assert local.world_size(settings("hardware.devices_per_node=3")) == 3


def test_hardware_that_is_not_here_is_refused(two_cards: None) -> None:
    with pytest.raises(ConfigError, match="this machine has 2"):
        local.world_size(config.compose(["hardware=node_8x80gb"]))
    with pytest.raises(ConfigError, match="slurm=cluster"):
        local.world_size(config.compose(["hardware=nodes_2x8x80gb"]))


def test_a_cuda_tier_without_cuda_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="hardware=cpu"):
        local.world_size(config.compose(["hardware=gpu_24gb"]))


def test_more_ranks_than_samples_are_refused(two_cards: None) -> None:
    cfg = config.compose(["hardware=auto", "train.global_batch_size=1"])
    with pytest.raises(ConfigError, match=r"hardware\.devices_per_node=1"):
        local.world_size(cfg)


def test_flags_of_one_process_and_of_several(run: RunDir, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one = local.launch(settings("run.max_restarts=2"), run, ["--config", "c"])
    assert "--multi_gpu" not in one.command
    assert one.command[-4:] == ["--module", "train", "--config", "c"]
    assert one.environment["OMP_NUM_THREADS"] == "7"
    assert one.restarts == 2
    three = local.launch(settings("hardware.devices_per_node=3", "run.max_restarts=2"), run, [])
    flags = " ".join(three.command)
    for flag in (
        "--multi_gpu",
        "--num_processes 3",
        "--max_restarts 0",
        "--main_process_port 0",
        "--mixed_precision no",
    ):
        assert flag in flags
    assert three.environment["OMP_NUM_THREADS"] == "2"
    assert three.restarts == 2  # ours: an elastic agent would start again whatever failed
    for asked, given in (("1", "1"), ("64", "2")):  # more threads than cores is never what was meant
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert local.launch(settings("hardware.devices_per_node=3"), run, []).environment["OMP_NUM_THREADS"] == given


def test_settings_of_other_launches_do_not_leak_in(run: RunDir, monkeypatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE", "PET_NNODES", "FSDP_VERSION", "MASTER_PORT"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("WANDB_MODE", "offline")
    launch = local.launch(settings(), run, [])
    environment = launch.full_environment()
    assert "7" not in {
        environment.get(name) for name in ("ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE", "PET_NNODES")
    }
    assert not {"FSDP_VERSION", "MASTER_PORT"} & environment.keys()
    assert environment["WANDB_MODE"] == "offline"
    assert str(launch) == str(local.launch(settings(), run, []))


PROBE = """
import json, os
names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP")
names += ("ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_MAX_RESTARTS")
rank = os.environ.get("RANK", "0")
with open(f"probe-{rank}.json", "w") as file:
    json.dump({name: os.environ.get(name) for name in names}, file)
"""

HOSTILE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_processes: 4
num_machines: 1
use_cpu: true
dynamo_config: {dynamo_backend: INDUCTOR}
fsdp_config: {fsdp_version: 2}
"""


@pytest.mark.ranks
@pytest.mark.parametrize("processes", [1, 2])
def test_an_accelerate_config_in_the_home_directory_changes_nothing(
    run: RunDir, tmp_path: Path, monkeypatch, processes: int
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").write_text(HOSTILE)
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "train.py").write_text("raise SystemExit('not the one that was meant')")
    cfg = settings(f"hardware.devices_per_node={processes}", "run.max_restarts=1")
    launch = local.launch(cfg, run, [], module="probe")
    subprocess.run(launch.command, env=launch.full_environment(), check=True, timeout=120)
    for rank in range(processes):
        seen = json.loads((tmp_path / f"probe-{rank}.json").read_text())
        assert seen["ACCELERATE_MIXED_PRECISION"] == "no"
        assert seen["ACCELERATE_DYNAMO_BACKEND"] in ("no", "NO")
        assert seen["ACCELERATE_USE_FSDP"] in (None, "false")
        assert seen["OMP_NUM_THREADS"] == launch.environment["OMP_NUM_THREADS"]
        if processes > 1:
            assert (seen["RANK"], seen["WORLD_SIZE"], seen["TORCHELASTIC_MAX_RESTARTS"]) == (str(rank), "2", "0")
        else:
            assert (seen["WORLD_SIZE"], seen["ACCELERATE_USE_CPU"]) == (None, "False")
    if processes == 1:  # control: without our file, that of the home directory decides
        at = launch.command.index("--config_file")
        bare = [*launch.command[:at], *launch.command[at + 2 :]]
        subprocess.run(bare, env=launch.full_environment(), check=False, timeout=120)
        assert json.loads((tmp_path / "probe-0.json").read_text())["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.ranks
def test_train_means_ours_whatever_lies_in_the_current_directory(run: RunDir, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("")
    (tmp_path / "train" / "__main__.py").write_text("raise SystemExit('not the one that was meant')")
    launch = local.launch(settings(), run, ["--help"])
    shown = subprocess.run(launch.command, env=launch.full_environment(), capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert "python -m train" in shown.stdout
