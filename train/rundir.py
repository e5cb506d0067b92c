"""A run directory: the names in it, the only ways to write there, and who may.

Owns: every file name of a run, atomic and append-only writes, `events.jsonl`, `result.json` and the exit code that
follows from it, the STOP and SAVE requests, the lock with the numbering of attempts, and the comparison of a command
with the run it would resume. Torch-free: `gearshift status` reads a directory in an instant.

Does not own: what a checkpoint holds (`checkpoint.py`), when to stop (`stop.py`), what a setting means (`config.py`),
what people are told about a run (`describe.py`).

Two rules keep a directory readable at every instant, on NFS too: a file that is replaced is written beside, fsynced
and renamed; a file that grows is appended to with one write per call, and its torn end is cut by the next owner.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from train import config
from train.compose import leaves, shown
from train.config import Config

DIRECTORY_MODE = 0o750
FILE_MODE = 0o640
"""Before the umask: never writable by others, whatever the umask says."""

STATUSES = ("running", "finished", "stopped", "failed")
EXIT_FINISHED, EXIT_FAILED, EXIT_CONFIG, EXIT_FIT, EXIT_MEMORY, EXIT_STOPPED = 0, 1, 2, 3, 12, 75
CLASSIFIED = {"bad_config": EXIT_CONFIG, "does_not_fit": EXIT_FIT, "out_of_memory": EXIT_MEMORY}
"""Reasons of a `failed` result that have an exit code of their own; any other reason is 1."""
FINAL = (*CLASSIFIED, "non-finite", "asked and got differ")
"""How the reason of a failure begins that another attempt would only repeat: it is never started again."""
FRUITLESS = 2
"""So many attempts in a row without a new checkpoint end a run."""

HEARTBEAT_S = 10.0
PATIENCE_S = 60.0
"""An owner on another host that does not beat for this long is dead."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class RunError(Exception):
    """The run directory cannot be used as asked; the message says what is there and what to type."""

    def __init__(self, message: str, code: int = EXIT_FAILED) -> None:
        """code: the exit code that a command ends with."""
        super().__init__(message)
        self.code = code


class Held(RunError):
    """Another process owns the run."""


class LockLost(RunError):
    """This process was the owner and no longer is: it must leave without committing."""


# ---------------------------------------------------------------------------------------------------------- writing


def make_directory(path: Path) -> Path:
    """Create `path` and what is missing above it, readable by the group, writable by the owner alone."""
    missing = []
    above = path
    while not above.exists():
        missing.append(above)
        above = above.parent
    for directory in reversed(missing):
        with suppress(FileExistsError):
            directory.mkdir(mode=DIRECTORY_MODE)
    return path


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace `path` as a whole: readers, and whoever comes after a crash, see the old content or the new."""
    with _written_beside(path, content) as temporary:
        os.replace(temporary, path)
    sync_directory(path.parent)


@contextmanager
def _written_beside(path: Path, content: str | bytes) -> Iterator[Path]:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: a number that is not finite becomes null (`loss_hex` and the like keep it)."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records to a .jsonl file with a single write, so that lines of two writers never mix. All of them or none."""
    content = "".join(to_json(record) + "\n" for record in records).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
    written = 0
    try:
        while written < len(content):
            written += os.write(descriptor, content[written:])
    except OSError:
        if written:  # a disk that fills up tears a line, and the next one would be glued to it
            with suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise
    finally:
        os.close(descriptor)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one record."""
    append_lines(path, [record])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records; none if the file is missing. A torn last line is left out; any other bad line raises `RunError`."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            break  # what follows the last newline is empty, or torn
        try:
            records.append(json.loads(line))
        except ValueError:
            if number == len(lines) - 1:
                break
            raise RunError(f"{path}, line {number}: not JSON; changed by hand, or by a failing disk.") from None
    return records


def last_record(path: Path, window: int = 65536) -> dict[str, Any] | None:
    """The newest whole record, reading only the file's end; `None` if there is none."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - window))
        for line in reversed(file.read().split(b"\n")[:-1]):
            with suppress(ValueError):
                return json.loads(line)
    return None


def _cut_torn_end(path: Path) -> None:
    """Cut what a killed writer, or a power cut that left zeros, put after the last whole record. Reads the file's end only:
    going on late in a run takes no longer than early."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        for window in (65536, size):
            start = file.seek(max(0, size - window))
            content = file.read()
            end = content.rfind(b"\n") + 1
            while end:
                record = content.rfind(b"\n", 0, end - 1) + 1
                try:
                    json.loads(content[record:end])
                    break
                except ValueError:
                    end = record
            if end or start == 0:
                if start + end != size:
                    file.truncate(start + end)
                return


# ------------------------------------------------------------------------------------------------------ the directory


class RunDir:
    """The directory of one run. Making the object touches nothing; `create` makes the directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(Path(path).expanduser()))
        self.config = self.path / "config.yaml"  # resolved and frozen
        self.identity = self.path / "math.json"  # what a resume is compared with
        self.data = self.path / "data.json"  # what `prepare` counted: enough to use the model without the data
        self.tokenizer = self.path / "tokenizer"  # of a language model, as Hugging Face's libraries load it
        self.plan = self.path / "plan.json"  # predicted
        self.env = self.path / "env.json"  # command, code, packages, devices of the newest attempt
        self.metrics = self.path / "metrics.jsonl"  # a line for every step
        self.events = self.path / "events.jsonl"  # start, resume, save, commit, stop, oom, failure, math_changed, end
        self.ledger = self.path / "ledger.jsonl"  # a line for every completed step: the samples it consumed
        self.result_file = self.path / "result.json"  # how the newest attempt stands
        self.checkpoints = self.path / "checkpoints"  # a directory for each committed step
        self.samples = self.path / "samples"  # what the model wrote or painted at evaluations
        self.logs = self.path / "logs"  # one for each rank
        self.code = self.path / "code"  # frozen at submission
        self.report = self.path / "report.html"  # the page for people
        self.lock = self.path / "lock"  # a small file for each attempt; the highest is the owner
        self.stop = self.path / "STOP"  # its existence asks to save and leave; its text is the reason
        self.save = self.path / "SAVE"  # its existence asks to save and go on

    def create(self) -> RunDir:
        """Make the directory and its fixed subdirectories."""
        for directory in (self.path, self.checkpoints, self.samples, self.logs, self.lock):
            make_directory(directory)
        return self

    def checkpoint(self, step: int) -> Path:
        """`checkpoints/step-00000100`: the state after update `step`."""
        return self.checkpoints / f"step-{step:08d}"

    def event(self, kind: str, **fields: Any) -> None:
        """Append to `events.jsonl`: `t` (s) never runs backwards on one machine, `time` is the wall clock."""
        clocks = {"t": round(time.monotonic(), 6), "time": round(time.time(), 3)}
        append_line(self.events, {"kind": kind, **clocks, **fields})

    def result(self) -> dict[str, Any] | None:
        """`result.json`, or `None` before the first attempt."""
        try:
            return json.loads(self.result_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise RunError(f"{self.result_file} is not JSON. Remove it: the next attempt writes it again.") from None

    def failure(self, attempt: int, reason: str) -> str:
        """Why `attempt` failed: `reason`, unless a rank wrote down one that explains more. Where one rank is out of memory,
        the others only see that it is gone."""
        told = [
            e["reason"] for e in read_jsonl(self.events) if e["kind"] in ("oom", "failure") and e["attempt"] == attempt
        ]
        return next((text for text in (reason, *told) if text.startswith((*FINAL, "hung"))), reason)

    def write_result(self, status: str, attempt: int, *, reason: str | None = None, **fields: Any) -> None:
        """Replace `result.json`. `reason`: why it stopped or failed, a word of `CLASSIFIED` where one fits."""
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {STATUSES}")
        record = {"status": status, "attempt": attempt, "reason": reason, "name": self.path.name, **fields}
        atomic_write(self.result_file, to_json(record, indent=2) + "\n")

    def last_attempt(self) -> int:
        """The highest attempt that left a trace, in a copy without the lock too; 0 before the first."""
        numbers = [0, (self.result() or {}).get("attempt", 0)]
        numbers += [int(file.stem) for file in self.lock.glob("*.json")]
        numbers += [event.get("attempt") or 0 for event in read_jsonl(self.events)]
        return max(numbers)

    def ask_to_stop(self, reason: str) -> None:
        """Write STOP. Ranks on every node see it at the next step boundary; the first reason stays."""
        if not self.stop.exists():
            atomic_write(self.stop, reason + "\n")

    def stop_reason(self) -> str | None:
        """The text of STOP, `STOP file` if it is empty (someone's `touch`), `None` without one."""
        try:
            return self.stop.read_text(errors="replace").strip()[:200] or "STOP file"
        except FileNotFoundError:
            return None

    def clear_requests(self) -> None:
        """Remove left-over STOP and SAVE, and a torn event. Only for whoever starts the ranks, while none run."""
        self.stop.unlink(missing_ok=True)
        self.save.unlink(missing_ok=True)
        _cut_torn_end(self.events)


def sync_file(path: Path) -> None:
    """Have what was appended to a file survive a power cut; one that is not there needs nothing."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


def committed(run: RunDir) -> list[int]:
    """Steps with a committed checkpoint, oldest first. The rename commits a directory whole: one that lacks anything was
    damaged since, and whoever reads it says so."""
    return sorted(int(path.name[5:]) for path in run.checkpoints.glob("step-*") if path.name[5:].isdigit())


def newest(run: RunDir) -> int:
    """Step of the newest committed checkpoint; 0 without one."""
    return max(committed(run), default=0)


def resolve(cfg: Config, math_hash: str) -> RunDir:
    """The directory of the run that `cfg` describes: `<run.root>/<run.name>`.

    Raises `RunError` for a name that could leave the root or upset a shell, a scheduler or a tracker.
    """
    name = cfg.run.name or f"{cfg.experiment}-{math_hash[:8]}"
    if not _NAME.fullmatch(name):
        raise RunError(
            f"run.name={name!r} is not a name: 1 to 96 letters, digits, `.`, `_` and `-`, a letter or digit first.\n"
            "Choose another with run.name=...; the directory above it is run.root.",
            EXIT_CONFIG,
        )
    return RunDir(Path(cfg.run.root) / name)


def exit_code(result: dict[str, Any] | None) -> int:
    """The contract's exit code for a result: 0 finished, 75 stopped, 2, 3 or 12 classified, 1 anything else."""
    status = (result or {}).get("status")
    if status == "finished":
        return EXIT_FINISHED
    if status == "stopped":
        return EXIT_STOPPED
    return CLASSIFIED.get((result or {}).get("reason") or "", EXIT_FAILED) if status == "failed" else EXIT_FAILED


# ------------------------------------------------------------------------------------------------ what a run is


@dataclass(frozen=True)
class Identity:
    """What a command would train, held against what the run directory was started with."""

    math_hash: str
    exec_hash: str
    math: dict[str, Any]
    """What entered the math hash; `train.precision` as it was written at the first start."""
    precision: str
    """The precision in force: what `auto` became at the first start, else the word of the command."""
    changes: tuple[str, ...] = ()
    """Accepted differences, one `key: old -> new` each."""


def admit(cfg: Config, run: RunDir, fingerprints: dict[str, str], *, accept: bool = False) -> Identity:
    """Compare `cfg` with the run it would start or resume; writes nothing.

    Where, how and what is watched may differ. Raises `RunError` (exit code 2) if what is learned differs and `accept`
    is not set: with the differences, and the line that accepts them.
    """
    stored = stored_identity(run)
    precision = cfg.train.precision
    if stored and stored["math"]["train"]["precision"] == "auto" and precision in ("auto", stored["precision"]):
        cfg = replace(cfg, train=replace(cfg.train, precision="auto"))
        precision = stored["precision"]
    math_now = config.math_dict(cfg, fingerprints)
    now = Identity(config.math_hash(cfg, fingerprints), config.exec_hash(cfg), math_now, precision)
    if not stored or stored["math_hash"] == now.math_hash:
        return now
    changes = config.diff(stored["math"], math_now)
    if accept:
        return replace(now, changes=tuple(changes))
    raise RunError(
        f"{run.path} is another experiment: resuming it with this command would change what is learned.\n"
        + "".join(f"  {change}\n" for change in changes)
        + f"To go on all the same:  gearshift resume {run.path} {_overrides(stored['math'], math_now)}--accept\n"
        + "To leave that run alone, give this one a name of its own:  run.name=...",
        EXIT_CONFIG,
    )


def write_config(cfg: Config, run: RunDir, identity: Identity) -> None:
    """Write `config.yaml`, under the run's name and with the precision that is in force."""
    named = replace(cfg.run, name=run.path.name, root=str(run.path.parent))
    frozen = replace(cfg, run=named, train=replace(cfg.train, precision=cast(Any, identity.precision)))
    atomic_write(run.config, config.to_yaml(frozen))


def freeze(cfg: Config, run: RunDir, identity: Identity, attempt: int) -> None:
    """Write `config.yaml` and `math.json`, and leave a `math_changed` event for accepted changes. Only for the owner.

    `identity.precision` must be resolved by now: it is what `config.yaml` gets, and what every later attempt keeps.
    """
    write_config(cfg, run, identity)
    record = {key: getattr(identity, key) for key in ("math_hash", "exec_hash", "precision", "math")}
    atomic_write(run.identity, to_json(record, indent=2) + "\n")
    if identity.changes:
        run.event("math_changed", attempt=attempt, math_hash=identity.math_hash, changes=list(identity.changes))


def stored_identity(run: RunDir) -> dict[str, Any] | None:
    """What the run was started with: `math.json`; in a copy that lacks it, what the newest checkpoint says."""
    manifests = [run.checkpoint(step) / "manifest.json" for step in committed(run)[-1:]]
    for file in [run.identity, *manifests]:
        try:
            found = json.loads(file.read_bytes())
            return found if file == run.identity else found.get("identity")
        except FileNotFoundError:
            continue
        except ValueError:
            raise RunError(f"{file} is not JSON. Without it a resume cannot be checked: restore it.") from None
    return None


def _overrides(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The differences that are settings, as overrides for a shell; changed content is none."""
    before, after = ({key: _at(math, key) for key in leaves(Config)} for math in (old, new))
    changed = [key for key in after if before[key] != after[key]]
    return "".join(shlex.quote(f"{key}={shown(after[key])}") + " " for key in changed)


def _at(nested: Any, key: str) -> Any:
    for name in key.split("."):
        nested = nested.get(name) if isinstance(nested, dict) else None
    return nested


# --------------------------------------------------------------------------------------------------------------- lock


class Lock:
    """One run directory, one owner; and the number of the attempt.

    The lock is a directory with a file per attempt, and the highest number owns the run. To take over from a dead owner
    is to create the next number, which the file system grants to one process only, so there is no moment without an
    owner and none with two. The file names its process and carries a heartbeat.

    An owner is dead at once when it released the lock, when its process on this host is gone, or when it was an earlier
    start of this very Slurm job. Any other is dead after `PATIENCE_S` without a heartbeat, by the clock of the one who
    waits: clocks of hosts are never compared. (`bury` is for a launcher that knows better, e.g. from the scheduler.)
    """

    def __init__(self, run: RunDir, attempt: int, heartbeat_s: float) -> None:
        self.run, self.attempt = run, attempt
        self._file = run.lock / f"{attempt:08d}.json"
        self._content = {"attempt": attempt, "token": secrets.token_hex(8), **_self(), "beat": 0, "released": False}
        self._heartbeat_s = heartbeat_s
        self._mutex = threading.Lock()
        self._leaving = threading.Event()

    @classmethod
    def acquire(
        cls,
        run: RunDir,
        *,
        patience_s: float = PATIENCE_S,
        heartbeat_s: float = HEARTBEAT_S,
        say: Callable[[str], None] = lambda _: None,
    ) -> Lock:
        """Become the owner, and cut the torn ends that the last one left. Raises `Held`, naming a live owner."""
        make_directory(run.lock)
        while True:
            attempt = run.last_attempt() + 1  # before the judgement: an owner that appears meanwhile has this number
            wait_until_free(run, patience_s=patience_s, say=say)
            lock = cls(run, attempt, heartbeat_s)
            with _written_beside(lock._file, to_json(lock._content)) as temporary, suppress(FileExistsError):
                os.link(temporary, lock._file)  # atomic, and refused if another process was faster
                with suppress(LockLost):
                    lock.check()  # by now an even higher number may own the run
                    break
                lock._file.unlink(missing_ok=True)
        for file in run.lock.glob("*.json"):
            if int(file.stem) < lock.attempt:
                file.unlink(missing_ok=True)
        for file in (run.metrics, run.events, run.ledger):
            _cut_torn_end(file)
        threading.Thread(target=lock._beat, name="lock-heartbeat", daemon=True).start()
        return lock

    def check(self) -> None:
        """Read the lock again, as every commit must. Raises `LockLost`."""
        owner = holder(self.run)
        if owner is None or owner.get("token") != self._content["token"] or owner.get("released"):
            now = describe(owner) if owner else "nobody"
            raise LockLost(f"{self.run.path} is no longer owned by attempt {self.attempt}; now by {now}.")

    def release(self) -> None:
        """Stop the heartbeat and say that the owner has left; silently, if the lock was lost."""
        self._leaving.set()
        with self._mutex, suppress(LockLost, OSError):
            self.check()
            atomic_write(self._file, to_json({**self._content, "released": True}))

    def _beat(self) -> None:
        while not self._leaving.wait(self._heartbeat_s):
            with self._mutex:
                if self._leaving.is_set():
                    return
                try:
                    self.check()
                    self._content["beat"] += 1
                    atomic_write(self._file, to_json(self._content))
                except LockLost:
                    return  # the next commit finds out
                except OSError:
                    continue  # a full or absent disk: others see no heartbeat, and that is true


def holder(run: RunDir) -> dict[str, Any] | None:
    """What the newest lock file says, or `None` if there is none."""
    files = sorted(run.lock.glob("*.json"), key=lambda file: int(file.stem))
    for file in reversed(files):
        with suppress(FileNotFoundError, ValueError):
            return json.loads(file.read_bytes())
    return None


def wait_until_free(
    run: RunDir, *, patience_s: float = PATIENCE_S, say: Callable[[str], None] = lambda _: None
) -> None:
    """Return when nobody owns the run; give an owner elsewhere `patience_s` for a sign of life. Raises `Held`."""
    first = holder(run)
    deadline = time.monotonic() + patience_s
    said = False
    while True:
        owner = holder(run)
        living = alive(owner)
        if owner is None or living is False:
            return
        if living or owner != first:
            raise Held(
                f"{run.path} is in use by {describe(owner)}.\n"
                f"Wait for it, stop it (`touch {run.stop}`), or give this run another name: run.name=..."
            )
        if time.monotonic() >= deadline:
            return bury(run, owner)
        if not said:
            say(f"{run.path} belongs to {describe(owner)}: waiting up to {patience_s:.0f} s for a sign of life.")
            said = True
        time.sleep(min(1.0, patience_s / 10))


def bury(run: RunDir, owner: dict[str, Any]) -> None:
    """Mark a lock as released whose owner is known to be dead. If it lives after all, its next `check` raises."""
    atomic_write(run.lock / f"{owner['attempt']:08d}.json", to_json({**owner, "released": True}))


def describe(owner: dict[str, Any]) -> str:
    """`attempt 3 (process 4711 on node7, Slurm job 12)`."""
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"attempt {owner.get('attempt')} (process {owner.get('pid')} on {owner.get('host')}{job})"


def alive(owner: dict[str, Any] | None) -> bool | None:
    """True or False where it can be known at once, `None` where only a heartbeat can tell."""
    if owner is None or owner.get("released"):
        return False
    me = _self()
    if owner.get("machine") == me["machine"]:
        return process_start(owner["pid"]) == owner.get("started")
    if me["job"] and owner.get("job") == me["job"] and (owner.get("job_start") or 0) < me["job_start"]:
        return False
    return None


def _self() -> dict[str, Any]:
    """This process, as a lock names it. `machine` is one boot of one kernel and one process-id namespace."""
    machine = socket.gethostname()
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return {
        "host": socket.gethostname(),
        "machine": machine,
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "job_start": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def process_start(pid: int) -> str | None:
    """When a process started, a word that no later process with this id shares; `None` if it is gone or a zombie."""
    if Path("/proc/self/stat").exists():
        try:  # not through the wall clock: it may be set meanwhile
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None
