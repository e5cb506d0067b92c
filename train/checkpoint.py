"""Portable checkpoints: ranges of named state in, ranges of named state out.

Owns: the format on disk (`docs/checkpoints.md`), saving without stopping the loop for longer than a copy, the commit, the
rotation, finding and verifying what was committed, reading any range of it, and the hash of the live state.

Does not own: which rank has which range (`train.strategy`), when to save (`main.py`), who owns the directory (`rundir.Lock`).
Nothing here knows how many ranks wrote a checkpoint or under which engine, and nothing is ever unpickled.

A checkpoint is a directory:

    step-00000100/manifest.json              what is where; hashes itself and every file
                  rank-00000.safetensors     flat fp32 ranges, named "<parameter>|<kind>|<start>"

Reading needs no torch until values become tensors, so `gearshift verify` and `status` start at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train import rundir
from train.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from train.config import CheckpointConfig
    from train.strategy import Processes, Strategy

log = logging.getLogger(__name__)

FORMAT = 1
CHUNK_BYTES = 16 * 2**20
PEER_TIMEOUT_S = 1800.0  # a rank that has not written its file by then is taken for dead


class CheckpointError(Exception):
    """A checkpoint cannot be used (or written) as asked; the message names the file and what is wrong with it."""


# --------------------------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------------------------


class Checkpointer:
    """Saves one run's state. One save at a time; a second waits for the first.

    Every rank copies its ranges out of the live state, then a thread of its own writes and hashes its file beside a small
    receipt. The main process's thread waits for all receipts, writes the manifest, and renames the directory: that
    rename is the commit. Threads talk through the directory only, so a save never meets a collective of the loop.
    """

    def __init__(
        self,
        run: RunDir,
        procs: Processes,
        strategy: Strategy,
        settings: CheckpointConfig,
        *,
        hashes: dict[str, str],
        lock: rundir.Lock | None,
        attempt: int,
        saved_step: int | None,
        best_step: int | None = None,
    ) -> None:
        """hashes: `math_hash` and `exec_hash`. lock: the main process's, read again at every commit. saved_step: the
        step that was resumed from, if any: its checkpoint exists. best_step: the best step by then."""
        self.run, self.procs, self.strategy, self.settings = run, procs, strategy, settings
        self.hashes, self.lock, self.attempt, self.saved_step = hashes, lock, attempt, saved_step
        self._best = best_step  # the newest best one that is committed
        self._buffer: Any = None
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, Exception] | None = None  # a step whose save failed, until that is reported
        self._base = saved_step or 0  # what this attempt goes on from
        if procs.is_main:
            self._sweep(None)  # what a kill left behind is as large as a checkpoint, and no rank saves yet

    def save(self, step: int, counters: dict[str, Any]) -> None:
        """Save the state after update `step`. Returns once the live state is copied (`asynchronous`) or committed.

        counters: JSON values that belong to the run: samples, best value and its step, patience count.
        Raises CheckpointError if a buffer has changed, which no checkpoint holds.
        """
        if step == self.saved_step:
            return
        self.wait()
        self.report(self.settings.on_error)  # before this save can hide what became of the last
        if changed := self.strategy.changed_buffers():
            raise CheckpointError(
                f"buffers of the model changed while it was trained ({', '.join(changed[:3])}): checkpoints hold parameters "
                "only. Freeze them (BatchNorm: keep it in evaluation mode), or make them parameters."
            )
        ranges, flat = self._copy()
        header, table = _header(ranges, {n: i for i, n in enumerate(self.strategy.shapes)})
        temporary = self.run.checkpoints / f".step-{step:08d}.{self.attempt}.tmp"
        self.saved_step, counters = step, dict(counters)
        if self.procs.is_main:
            self.run.event("save", step=step, attempt=self.attempt)

        def write() -> None:
            receipt: dict[str, Any]
            try:
                rundir.make_directory(temporary)
                receipt = _write_file(temporary, self.procs.rank, header, flat, table)
            except Exception as error:
                error = self._explained(error, temporary, len(header) + flat.nbytes)
                self._failed, receipt = (step, error), {"error": f"{type(error).__name__}: {error}"}
            if not self.procs.is_main:
                return _leave_receipt(temporary, self.procs.rank, receipt)
            try:
                if "error" not in receipt:
                    return self._commit(temporary, step, counters, receipt)
            except Exception as error:
                self._failed = step, self._explained(error, temporary, len(header) + flat.nbytes)
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back

        self._thread = threading.Thread(target=write, name=f"save-{step}", daemon=True)
        self._thread.start()
        if not self.settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the save under way, if any, is committed or has failed. Failures are for `failure` to report."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def report(self, on_error: str) -> None:
        """Say once that the last save failed (the checkpoints before it are untouched); raise, if that is to stop the run.

        A lost lock always raises: another process owns the run by now.
        """
        failed, self._failed = self._failed, None
        if failed is None:
            return
        step, error = failed
        if on_error == "stop" or isinstance(error, rundir.LockLost):
            raise error
        log.error("the save of step %d failed, older checkpoints stay: %s", step, error)
        with suppress(OSError):  # the disk may be full
            self.run.event("save_failed", step=step, attempt=self.attempt, error=str(error))

    def _explained(self, error: Exception, path: Path, size: int) -> Exception:
        """An error of the file system with what a person needs: the path, what is needed, what is free."""
        if not isinstance(error, OSError):
            return error
        text = f"{error.filename or path}: {error.strerror or error}; {size / 2**20:.1f} MiB needed"
        with suppress(OSError):
            disk = os.statvfs(self.run.checkpoints)
            text += f", {disk.f_bavail * disk.f_frsize / 2**20:.1f} MiB free"
            text += f", {disk.f_favail:,} inodes free" if disk.f_files else ""
        return OSError(text)

    def _copy(self) -> tuple[list[tuple[str, str, int, int]], np.ndarray]:
        """Ranges (name, kind, start, numel) and their values, one after the other, in a host buffer that is reused."""
        import torch

        owned = list(self.strategy.owned())
        total = sum(t.numel() for *_, t in owned)
        if self._buffer is None or self._buffer.numel() != total:
            pin = self.procs.device.type == "cuda"
            self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=pin)
        offset = 0
        for *_, tensor in owned:
            self._buffer[offset : offset + tensor.numel()].copy_(tensor.detach(), non_blocking=True)
            offset += tensor.numel()
        if self.procs.device.type == "cuda":
            torch.cuda.synchronize(self.procs.device)
        return [(n, k, s, t.numel()) for n, k, s, t in owned], self._buffer.numpy()

    def _commit(self, temporary: Path, step: int, counters: dict[str, Any], receipt: dict[str, Any]) -> None:
        """On the main process: when every rank has written, name and hash it all, and rename the directory. receipt: its own."""
        receipts = self._receipts(temporary, receipt)
        failed = [f"rank {rank}: {r['error']}" for rank, r in sorted(receipts.items()) if "error" in r]
        if failed:
            raise CheckpointError("; ".join(failed))
        manifest = self._manifest(step, counters, receipts)
        for file in temporary.glob("receipt-*.json"):
            file.unlink()
        rundir.atomic_write(temporary / "manifest.json", json.dumps(manifest))
        rundir.sync_directory(temporary)
        for file in (self.run.ledger, self.run.metrics, self.run.events):
            rundir.sync_file(file)  # what led here is as durable as what it led to
        if self.lock is not None:
            self.lock.check()
        final = self.run.checkpoint(step)
        if final.exists():  # a corrupt one, or one of an attempt that this one left behind by going back before it
            _discard(final)
        os.rename(temporary, final)
        rundir.sync_directory(self.run.checkpoints)
        with suppress(OSError):  # a disk without room for a line; the checkpoint is committed
            self.run.event("commit", step=step, attempt=self.attempt)
        self._rotate(step, counters.get("best_step"))

    def _manifest(self, step: int, counters: dict[str, Any], receipts: dict[int, dict[str, Any]]) -> dict[str, Any]:
        manifest = {
            "format": FORMAT,
            "step": step,
            "attempt": self.attempt,
            **self.hashes,
            "identity": rundir.stored_identity(self.run),
            "counters": counters,
            "optimizer_steps": counters.get("updates", step),
            "tensors": [[n, list(shape)] for n, shape in self.strategy.shapes.items()],
            "aliases": self.strategy.aliases,
            "kinds": sorted({k for receipt in receipts.values() for k in receipt["kinds"]}),
            "files": [receipt for _, receipt in sorted(receipts.items()) if receipt["ranges"]],
            "saved_under": {"strategy": self.strategy.name, "world_size": self.procs.world_size},
            "libraries": {p: metadata.version(p) for p in ("torch", "accelerate", "safetensors", "transformers")},
        }
        return {**manifest, "manifest_sha256": _manifest_hash(manifest)}

    def _receipts(self, temporary: Path, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        deadline = time.monotonic() + PEER_TIMEOUT_S
        receipts = {0: own}
        while len(receipts) < self.procs.world_size:
            for rank in range(self.procs.world_size):
                file = temporary / f"receipt-{rank:05d}.json"
                if rank not in receipts and file.exists():
                    receipts[rank] = json.loads(file.read_bytes() or '{"error": "the disk took not even the reason"}')
            if len(receipts) < self.procs.world_size:
                if time.monotonic() > deadline:
                    missing = sorted(set(range(self.procs.world_size)) - set(receipts))
                    raise CheckpointError(f"ranks {missing} did not write within {PEER_TIMEOUT_S:.0f} s")
                time.sleep(0.005)
        return receipts

    def _rotate(self, newest: int, best_step: int | None) -> None:
        """Only after the commit of `newest`: keep the last ones, the best, and every n-th. What another attempt saved above
        the step that this one went on from is of a history that was left (`--step`), or damaged."""
        steps = rundir.committed(self.run)
        left = {s for s in steps if s > self._base and s != newest and _attempt(self.run.checkpoint(s)) != self.attempt}
        every = self.settings.keep_every
        if best_step in steps:  # else its save failed, and the best one before it stays
            self._best = best_step
        best = self._best if self.settings.keep_best else None
        kept = set([step for step in steps if step not in left][-self.settings.keep :]) | {best}
        for step in steps:
            if step in left or (step not in kept and not (every and step % every == 0)):
                _discard(self.run.checkpoint(step))
        self._sweep(newest)

    def _sweep(self, newest: int | None) -> None:
        """Remove what saves that were killed, and discards, left behind. newest: the step just committed; None at the start."""
        for stale in self.run.checkpoints.glob(".*"):  # of saves that were killed, and of discards
            save = re.fullmatch(r"\.step-(\d+)\.(\d+)\.tmp", stale.name)
            if save and newest is not None and int(save[1]) > newest and int(save[2]) == self.attempt:
                continue  # a rank that was faster than this thread has begun the next save
            if stale.suffix in (".tmp", ".gone"):
                shutil.rmtree(stale, ignore_errors=True)


def _discard(path: Path) -> None:
    """Rename first: a directory that is half deleted must not look committed."""
    gone = path.parent / f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.gone"
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _header(ranges: list[tuple[str, str, int, int]], names: dict[str, int]) -> tuple[bytes, dict[str, Any]]:
    """The safetensors header of flat fp32 ranges that lie one after the other, and the table for the manifest."""
    entries: dict[str, Any] = {}
    offset, table, kinds = 0, {}, []
    for name, kind, start, numel in ranges:
        entries[f"{name}|{kind}|{start}"] = {
            "dtype": "F32",
            "shape": [numel],
            "data_offsets": [offset, offset + 4 * numel],
        }
        offset += 4 * numel
        table[names[name], start] = numel
        if kind not in kinds:
            kinds.append(kind)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {
        "kinds": kinds,
        "ranges": [[i, start, numel] for (i, start), numel in table.items()],
    }


def _write_file(directory: Path, rank: int, header: bytes, flat: np.ndarray, table: dict[str, Any]) -> dict[str, Any]:
    """Write one rank's file, hashing on the way; what the manifest is to say about it."""
    name = f"rank-{rank:05d}.safetensors"
    digest, size = hashlib.sha256(header), len(header) + flat.nbytes
    if table["ranges"]:
        if shutil.disk_usage(directory).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = flat.data.cast("B")
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, rundir.FILE_MODE)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(header)
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            os.fsync(file.fileno())
    return {"name": name, "sha256": digest.hexdigest(), "size": size, **table}


def _leave_receipt(directory: Path, rank: int, content: dict[str, Any]) -> None:
    """Tell the main process, which waits for it, that this rank has written, or why not."""
    file = directory / f"receipt-{rank:05d}.json"
    try:
        rundir.atomic_write(file, json.dumps(content))
    except OSError as error:
        log.error("rank %d cannot write to %s: %s", rank, directory, error)
        with suppress(OSError):  # an empty file fits where nothing else does
            file.touch()


def _manifest_hash(manifest: dict[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Finding and reading
# --------------------------------------------------------------------------------------------------------------------


class Reader:
    """One committed checkpoint: its manifest, and any range of any state in it. Maps files; reads what is asked for.

    Raises CheckpointError for a manifest that does not hash to itself, names a file outside, or whose ranges do not tile
    every tensor exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
            if self.manifest["manifest_sha256"] != _manifest_hash(self.manifest):
                raise CheckpointError(f"{path}/manifest.json does not hash to what it says: it was changed or cut")
            if self.manifest["format"] != FORMAT:
                raise CheckpointError(f"{path}: format {self.manifest['format']}; this version reads {FORMAT}")
            self._read_manifest()
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path}/manifest.json: {type(error).__name__}: {error}") from None
        self._files: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}

    def _read_manifest(self) -> None:
        path = self.path
        self.step: int = self.manifest["step"]
        self.kinds: list[str] = self.manifest["kinds"]
        self.shapes = {name: tuple(shape) for name, shape in self.manifest["tensors"]}
        self._index: dict[str, list[tuple[int, int, int]]] = {name: [] for name in self.shapes}  # start, numel, file
        if re.fullmatch(r"step-\d+", path.name) and path.name != f"step-{self.step:08d}":
            raise CheckpointError(f"{path} holds step {self.step}: it was copied to another step's name")
        if not all(isinstance(self.manifest[key], dict) for key in ("counters", "aliases")):
            raise CheckpointError(f"{path}/manifest.json: `counters` and `aliases` must be objects")
        names = list(self.shapes)
        numbers = [n for shape in self.shapes.values() for n in shape]
        numbers += [n for file in self.manifest["files"] for piece in file["ranges"] for n in piece]
        if any(type(n) is not int or n < 0 for n in numbers):
            raise CheckpointError(f"{path}/manifest.json: shapes and ranges must be whole numbers, 0 or more")
        for number, file in enumerate(self.manifest["files"]):
            if not re.fullmatch(r"[\w-][\w.-]*", file["name"]):
                raise CheckpointError(f"{path}: file name {file['name']!r} leads elsewhere")
            if sorted(file["kinds"]) != self.kinds:
                raise CheckpointError(f"{path}: {file['name']} holds {file['kinds']}, the checkpoint {self.kinds}")
            for i, start, numel in file["ranges"]:
                self._index[names[i]].append((start, numel, number))
        for name, pieces in self._index.items():
            pieces.sort()
            reached = 0
            for start, numel, _ in pieces:
                if start != reached:
                    raise CheckpointError(f"{path}: {name} has a gap or an overlap at element {min(start, reached)}")
                reached = start + numel
            if reached != math.prod(self.shapes[name]):
                raise CheckpointError(f"{path}: {name} ends at element {reached} of {math.prod(self.shapes[name])}")

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare size and sha256 of every file with the manifest, and its header with the ranges that it is to hold.

        share=(r, n): only of every n-th file from the r-th on.
        """
        for number in range(share[0], len(self.manifest["files"]), share[1]):
            file = self.manifest["files"][number]
            path = self.path / file["name"]
            digest = hashlib.sha256()
            try:
                if path.stat().st_size != file["size"]:
                    raise CheckpointError(f"{path}: {path.stat().st_size} bytes, {file['size']} were written")
                with open(path, "rb", buffering=0) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        digest.update(chunk)
                if digest.hexdigest() != file["sha256"]:
                    raise CheckpointError(f"{path}: sha256 differs from the manifest's: the file is corrupt")
                names = list(self.shapes)
                wanted = {
                    f"{names[i]}|{k}|{start}": ("F32", [numel], 4 * numel)
                    for i, start, numel in file["ranges"]
                    for k in file["kinds"]
                }
                data, entries = self._open(number)
                spans = {entry: at["data_offsets"] for entry, at in entries.items()}
                held = {entry: (at["dtype"], at["shape"], end - begin)
                        for (entry, at), (begin, end) in zip(entries.items(), spans.values(), strict=True)}  # fmt: skip
                begins, ends = zip(*sorted(spans.values()), strict=True)
                if held != wanted or (*begins, data.size) != (0, *ends):
                    raise CheckpointError(f"{path}: its header is not that of the ranges in the manifest")
            except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None

    def read(self, name: str, kind: str, start: int, numel: int) -> np.ndarray:
        """`numel` flat fp32 values of `name` from element `start` on."""
        if name not in self._index:
            raise CheckpointError(f"{self.path} holds no {name}")
        out = np.empty(numel, dtype=np.float32)
        for first, length, number in self._index[name]:
            low, high = max(first, start), min(first + length, start + numel)
            if low < high:
                data, entries = self._open(number)
                a, b = entries[f"{name}|{kind}|{first}"]["data_offsets"]
                out[low - start : high - start] = data[a:b].view(np.float32)[low - first : high - first]
        return out

    def _open(self, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        if number not in self._files:
            data = np.memmap(self.path / self.manifest["files"][number]["name"], dtype=np.uint8, mode="r")
            length = int.from_bytes(bytes(data[:8]), "little")
            self._files[number] = data[8 + length :], json.loads(bytes(data[8 : 8 + length]))
        return self._files[number]


def choose(run: RunDir, which: str | int = "last") -> Iterator[Path]:
    """Candidates to resume from, best first: a step by number, `best`, or `last` with all older ones behind it.

    `last` follows the newest attempt: one that went back (`--step`) and died leaves later steps that are not its own.
    Raises CheckpointError when the one that was named does not exist.
    """
    steps = rundir.committed(run)
    if which == "last":
        attempts = {step: _attempt(run.checkpoint(step)) for step in steps}
        last = _last(run, attempts)
        # One whose attempt cannot be read is damaged: whoever verifies it names it and passes on.
        yield from (run.checkpoint(s) for s in reversed(steps) if s <= last or not attempts[s])
        return
    wanted: int | None
    if which == "best":
        wanted = next((step for step in _told_best(run, steps) if step in steps), None)
    else:
        wanted = int(which)
    if wanted not in steps:
        raise CheckpointError(
            f"{run.path} has no checkpoint of step {wanted if wanted is not None else which}; it has {steps}"
        )
    yield run.checkpoint(wanted)


def _told_best(run: RunDir, steps: list[int]) -> Iterator[int | None]:
    """The best step as each checkpoint knew it, newest first; damaged ones are named and passed over."""
    for step in reversed(steps):
        try:
            yield Reader(run.checkpoint(step)).manifest["counters"].get("best_step")
        except CheckpointError as error:
            log.warning("passing over %s", error)


def _last(run: RunDir, attempts: dict[int, int]) -> int:
    """The newest step of the newest attempt: what it has saved last, else what it began from."""
    began = [e for e in rundir.read_jsonl(run.events) if e["kind"] == "resume"]
    newest = max(attempts, key=lambda step: (attempts[step], step), default=0)
    if began and began[-1]["attempt"] > attempts.get(newest, 0) and began[-1]["step"] in attempts:
        return began[-1]["step"]
    return newest


def _attempt(path: Path) -> int:
    """The attempt that wrote a checkpoint, from the first bytes of its manifest, which may be long; 0 if they do not tell."""
    with suppress(OSError), open(path / "manifest.json", "rb") as file:
        found = re.search(rb'"attempt": (\d+)', file.read(200))
        return int(found[1]) if found else 0
    return 0


def newest(
    run: RunDir, procs: Processes, which: str | int = "last", say: Callable[[str], None] = log.warning
) -> Reader | None:
    """The first candidate that verifies, the work of hashing shared over the ranks; None if there is no checkpoint.

    Corrupt ones are named and passed over, before any state is touched. Raises CheckpointError if all are corrupt.
    """
    candidates = procs.from_main(lambda: [str(p) for p in choose(run, which)])
    for candidate in candidates:
        try:
            reader = Reader(Path(candidate))
            reader.verify((procs.rank, procs.world_size))
            problem = None
        except CheckpointError as error:
            problem = str(error)
        problems = [p for p in procs.gather(problem) if p]
        if not problems:
            return reader
        if procs.is_main:
            say(f"passing over {candidate}: {problems[0]}")
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {run.checkpoints} verifies. Restore one from a copy, or start again with another run.name."
        )
    return None


def find(run: RunDir, step: str | int) -> Path:
    """The checkpoint that `best` (the newest, where nothing was evaluated), `last` or a number means. Raises CheckpointError."""
    try:
        path = next(choose(run, step), None)
    except CheckpointError as error:
        if step != "best":
            raise
        log.warning("%s: the newest one is taken", error)
        path = next(choose(run, "last"), None)
    if path is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet; a run saves at every stop and at its end.")
    return path


def read_masters(run_dir: str | Path, step: str | int = "best", *, averaged: bool = True) -> dict[str, torch.Tensor]:
    """Trained weights by name, fp32 on the CPU, aliases of tied ones included; the moving average where there is one."""
    import torch

    path = find(RunDir(run_dir), step)
    reader = Reader(path)
    reader.verify()
    kind = "ema" if averaged and "ema" in reader.kinds else "master"
    weights = {n: torch.from_numpy(reader.read(n, kind, 0, math.prod(s))).view(s) for n, s in reader.shapes.items()}
    weights.update({alias: weights[name] for alias, name in reader.manifest["aliases"].items()})
    return weights


def load(strategy: Strategy, reader: Reader) -> None:
    """Fill the live state from a verified checkpoint. Raises CheckpointError when names or shapes differ."""
    import torch

    if reader.shapes != strategy.shapes:
        missing = sorted(set(strategy.shapes) - set(reader.shapes))
        extra = sorted(set(reader.shapes) - set(strategy.shapes))
        differ = sorted(n for n in set(reader.shapes) & set(strategy.shapes) if reader.shapes[n] != strategy.shapes[n])
        raise CheckpointError(
            f"{reader.path} is of another model. Missing: {missing[:5]}; not in this model: {extra[:5]}; other shape: {differ[:5]}"
        )
    if lacking := sorted(set(strategy.kinds()) - set(reader.kinds)):
        raise CheckpointError(
            f"{reader.path} holds {', '.join(reader.kinds)} of each parameter, and this optimizer goes on from "
            f"{', '.join(lacking)} too. Keep the optimizer, or start another run from these weights: model.path=RUN."
        )
    updates = reader.manifest["counters"].get("updates", reader.step)  # a skipped step is none
    strategy.load(lambda n, k, s, c: torch.from_numpy(reader.read(n, k, s, c)), updates, reader.kinds)


# --------------------------------------------------------------------------------------------------------------------
# The hash of the live state
# --------------------------------------------------------------------------------------------------------------------


def state_hash(strategy: Strategy, procs: Processes) -> str | None:
    """sha256 over names in order: shape, and the fp32 bytes of master and moments, whoever owns them.

    Collective under sharded strategies, where the main process gathers; None on the other ranks then.
    """
    digest = hashlib.sha256()
    if strategy.replicated:
        held = {(n, k): t for n, k, _, t in strategy.held()}
        for name in sorted(strategy.shapes):
            digest.update(f"{name}{list(strategy.shapes[name])}".encode())
            for kind in strategy.kinds():
                digest.update(held[name, kind].detach().cpu().numpy().tobytes())
        return digest.hexdigest()
    import torch
    import torch.distributed as dist

    pieces = {(n, k, s): t for n, k, s, t in strategy.owned() if k != "ema"}
    everyone = procs.gather([[n, k, s, t.numel()] for (n, k, s), t in pieces.items()])
    owners: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for rank, listed in enumerate(everyone):
        for n, k, s, count in listed:
            owners.setdefault((n, k), []).append((s, count, rank))
    for name in sorted(strategy.shapes):
        digest.update(f"{name}{list(strategy.shapes[name])}".encode())
        for kind in strategy.kinds():
            for start, count, rank in sorted(owners[name, kind]):
                if rank == procs.rank:
                    value = pieces[name, kind, start].detach().float().cpu().contiguous()
                    if rank != 0:
                        dist.send(value, 0)
                elif procs.is_main:
                    value = torch.empty(count)
                    dist.recv(value, rank)
                if procs.is_main:
                    digest.update(value.numpy().tobytes())
    return digest.hexdigest() if procs.is_main else None
