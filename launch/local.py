"""A run on this machine: one `accelerate launch` with explicit flags, watched until it has ended.

Owns: how many processes there are and with how many threads; the command line and the environment of the ranks; what
happens on a signal (STOP is written, the run saves and leaves), when the launcher or a rank dies (`run.max_restarts`), and
that nothing is left running; the exit code.

Does not own: what is run and where it is kept (`cli.py`), the training (`train`), batch systems (`slurm.py`).
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from train import rundir
from train.config import Config, ConfigError
from train.rundir import RunDir

CHECKOUT = Path(__file__).resolve().parent.parent
ACCELERATE_CONFIG = Path(__file__).with_name("accelerate.yaml")

SHUTDOWN_S = 120
"""What ranks get to save and leave once their launcher is told to end, or is gone."""
STRAGGLER_S = 5
"""What helper processes of a run that has ended get, such as a tracker's."""

_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
_FOREIGN = re.compile(
    r"(ACCELERATE|FSDP|PET|TORCHELASTIC|MEGATRON_LM)_.*|((LOCAL|GROUP|ROLE)_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)
"""Variables of other launches, which would change this one."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Launch:
    """What is started: a command, and how its environment differs from this process's."""

    command: list[str]
    environment: dict[str, str]
    restarts: int = 0
    """Starts after the first that `supervise` may make. It does so itself, for one rank and for many: an elastic agent starts
    again whatever failed, out of memory too, and its own store outlives the ranks whose addresses it holds."""

    def __str__(self) -> str:
        """As a shell would take it."""
        return shlex.join(
            ["env", *(f"{key}={value}" for key, value in sorted(self.environment.items())), *self.command]
        )

    def full_environment(self) -> dict[str, str]:
        """This process's environment without settings of other launches, and with ours."""
        return {**{k: v for k, v in os.environ.items() if not _FOREIGN.fullmatch(k)}, **self.environment}


# --------------------------------------------------------------------------------------------------- what is started


def launch(
    cfg: Config, run: RunDir, arguments: list[str], *, processes: int | None = None, module: str = "train"
) -> Launch:
    """The `accelerate launch` of `cfg` on this machine; `arguments` go to the training script.

    processes: `world_size`, unless given. Raises ConfigError if this machine has not the devices that `cfg.hardware` names.
    """
    processes = processes or world_size(cfg)
    threads = max(1, min(cores() // processes, int(os.environ.get("OMP_NUM_THREADS") or 2**31)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIG)]
    command += ["--num_machines", "1", "--machine_rank", "0", "--num_processes", str(processes)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(threads)]
    if processes > 1:  # on a CPU too: `--cpu --num_processes N` starts one process, this flag means torchrun
        command += ["--multi_gpu", "--main_process_port", "0", "--max_restarts", "0"]
    command += ["--quiet", "--module", module, *arguments]  # quiet: the script's own error is the last word
    environment = {
        "GEARSHIFT_ATTEMPT_TOKEN": str(run.last_attempt() + 1),
        "OMP_NUM_THREADS": str(threads),
        "PET_SIGNALS_TO_HANDLE": ",".join(s.name for s in _SIGNALS),
        # `train` means ours, whatever lies in the current directory, which stays importable for plug-ins.
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S),
    }
    return Launch(command, environment, cfg.run.max_restarts)


def world_size(cfg: Config) -> int:
    """Processes to start: `hardware.devices_per_node`, else all GPUs, else one. Raises ConfigError."""
    hardware, samples = cfg.hardware, cfg.train.global_batch_size
    present = 0 if hardware.device in ("cpu", "mps") else gpus()
    wanted = hardware.devices_per_node or present or 1
    problems = []
    if hardware.nodes != "1":
        problems.append(
            f"hardware.nodes={hardware.nodes}: this machine is one; add slurm=cluster, or hardware.nodes=1."
        )
    if hardware.device == "cuda" and not present:
        problems.append(f"hardware={hardware.name}: needs CUDA devices, and there are none here; use hardware=cpu.")
    elif present and wanted > present:
        problems.append(f"hardware.devices_per_node={wanted}: this machine has {present}; set it to at most that.")
    if wanted > samples:
        problems.append(
            f"train.global_batch_size={samples}: {wanted} processes need a sample each; set "
            f"hardware.devices_per_node={samples}, or a larger batch."
        )
    if problems:
        raise ConfigError(problems)
    return wanted


def gpus() -> int:
    """NVIDIA devices that a process started here would see; without torch."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
        present = sum(line.startswith("GPU ") for line in listing.splitlines())
    except (OSError, subprocess.SubprocessError):
        present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",")]
    ends = [i for i, name in enumerate(names) if name in ("", "-1")]  # CUDA ignores what follows an invalid one
    return min(present, ends[0] if ends else len(names))


def cores() -> int:
    """Cores that this process may use: affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


# ------------------------------------------------------------------------------------------------------- supervision


def supervise(launch: Launch, run: RunDir, say: Callable[[str], None]) -> int:
    """Start the ranks, wait for them, leave nothing running, and return the contract's exit code.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP write STOP and wait; a second SIGINT a second or more later kills at once.
    `result.json` of an attempt that started here is trusted before any exit code. An unexplained death is followed by another
    start, at most `launch.restarts` times and not after `FRUITLESS` in a row that brought no new checkpoint.
    """
    before, command, fruitless = run.last_attempt(), list(launch.command), 0
    known = {child.pid for child in _children()}
    if not _is_anothers(run):
        run.clear_requests()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphaned ranks become children of this process and can be found
    on_start = _end_with_parent()
    with _answering_signals(run, known, say):
        for start in range(1 + launch.restarts):
            attempt, saved = run.last_attempt(), rundir.committed(run)
            child = subprocess.Popen(
                command, env=launch.full_environment(), start_new_session=True, preexec_fn=on_start
            )
            code = child.wait()
            _wait_for_rest(known, STRAGGLER_S if code == 0 or _ended(run, attempt) else SHUTDOWN_S)
            if _is_anothers(run):  # its ranks were faster, ours have said so; result and requests are its own
                return rundir.EXIT_FAILED
            result = _result(run, attempt, code)
            progress = rundir.committed(run) != saved
            fruitless = 0 if progress else fruitless + 1
            if result.get("status") in ("finished", "stopped") or (result.get("reason") or "").startswith(rundir.FINAL):
                break
            if code == 0 or run.stop_reason() or start == launch.restarts:
                break
            why = result.get("reason") or f"exit code {code} before the run began"
            if fruitless == rundir.FRUITLESS:
                at = max(saved, default=0)
                why = f"no-progress: {fruitless} attempts in a row ended without a new checkpoint (step {at}); {why}"
                if result:
                    rundir.atomic_write(run.result_file, rundir.to_json({**result, "reason": why}, indent=2) + "\n")
                say(why)
                break
            say(f"The run died ({why}): restart {start + 1} of {launch.restarts}.")
            if progress and "--step" in command:  # the next start goes on from what was saved since
                at = command.index("--step")
                del command[at : at + 2]
    run.clear_requests()
    if (run.result() or {"attempt": 0})["attempt"] <= before:  # no attempt began: a finished run has nothing to do
        done = code == 0 and (run.result() or {}).get("status") == "finished"
        return rundir.EXIT_FINISHED if done else rundir.EXIT_FAILED
    return rundir.exit_code(run.result())


def _is_anothers(run: RunDir) -> bool:
    """Whether a process owns the run while none of ours is left (or yet there)."""
    return rundir.alive(rundir.holder(run)) is not False


def _ended(run: RunDir, before: int) -> bool:
    """Whether an attempt after `before` wrote down how it ended."""
    result = run.result()
    return result is not None and result["attempt"] > before and result["status"] != "running"


def _result(run: RunDir, before: int, code: int) -> dict[str, Any]:
    """`result.json` of the attempt after `before`, completed where its ranks could not do so; empty if none began."""
    result = run.result()
    if result is None or result["attempt"] <= before:
        return {}
    if result["status"] == "running":  # nobody is left who could say how it ended
        reason = run.failure(result["attempt"], f"the ranks died (exit code {code})")
        result |= {"status": "failed", "reason": reason}
        rundir.atomic_write(run.result_file, rundir.to_json(result, indent=2) + "\n")
    return result


@contextmanager
def _answering_signals(run: RunDir, known: set[int], say: Callable[[str], None]) -> Iterator[None]:
    interrupted_at = 0.0

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted_at
        if number == signal.SIGINT:
            if interrupted_at and time.monotonic() - interrupted_at >= 1:
                say("Leaving at once; the last checkpoint stays.")
                _send(signal.SIGKILL, known)
                return
            interrupted_at = interrupted_at or time.monotonic()
        if run.stop_reason() is None:
            say("Stopping: the run saves after this step and leaves. Ctrl-C again leaves at once.")
            try:
                run.ask_to_stop(f"signal {signal.Signals(number).name}")
            except OSError as error:  # a full disk: ranks hear signals too
                say(f"STOP could not be written ({error}); passing SIGTERM on.")
                _send(signal.SIGTERM, known)

    wanted = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup stays nohup
    former = {number: signal.signal(number, answer) for number in wanted}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _children() -> list:
    import psutil

    return psutil.Process().children(recursive=True)


def _send(number: signal.Signals, known: set[int]) -> None:
    """A signal to everything below this process that was not there before."""
    for child in _children():
        if child.pid not in known:
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)


def _wait_for_rest(known: set[int], patience_s: float) -> None:
    """Wait for processes that outlive their launcher (ranks that save, helpers that flush), then kill them."""
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if all(child.pid in known for child in _children()):
            return
        if time.monotonic() >= deadline:
            _send(signal.SIGKILL, known)
        time.sleep(0.05)


def _end_with_parent() -> Callable[[], None] | None:
    """For Popen: the child gets SIGTERM when this process dies, however it dies (Linux)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here: after a fork as little as possible may happen
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) and None


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
