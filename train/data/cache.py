"""The cache of prepared data: content fingerprints recorded once, and directories that appear whole or not at all.

Owns: where the cache lies, the index by which an unchanged file is known without reading it again, publication by
rename, and the quarantine of what could not be read. Several users may share a cache; everything in it is made with the
permissions of their umask, and two processes that prepare the same thing both succeed.

Does not own: what is prepared, and how it is laid out inside its directory. Imports the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data import DataError

if TYPE_CHECKING:
    from train.config import Config, DataConfig

_RACY_NS = 2_000_000_000  # a file may change again within the clock tick of its last change, and look unchanged
_ABANDONED_S = 7 * 24 * 3600
_HOPELESS = 1_000  # when so many rows are bad and none is good, the rest need not be read

QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class FileId:
    """A file by its content: what enters a fingerprint."""

    name: str
    """Relative to what the user named, with forward slashes; never where that lies."""
    size: int
    sha256: str


def cache_root(cfg: Config) -> Path:
    """`data.cache_dir`, or `$XDG_CACHE_HOME/gearshift`, or `~/.cache/gearshift`."""
    if cfg.data.cache_dir:
        return Path(cfg.data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gearshift"


def identify(cache: Path, root: Path, files: Iterable[tuple[str, Path]]) -> list[FileId]:
    """The content of `files`, pairs of a name and where it lies, all of them below `root`.

    A file is read when its size or times differ from those of the last time it was read; the index of them lies in the
    cache, and a cache that cannot be written costs only time. Raises DataError on a file that cannot be read.
    """
    index_path = cache / "index" / f"{digest(os.path.abspath(root))[:32]}.json"
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError):  # missing, or torn by a full disk: then everything is read
        known = json.loads(index_path.read_text())
    found, index, started_ns = [], {}, time.time_ns()
    for name, path in files:
        try:
            stat = path.stat()
            times = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            entry = known.get(name, [])
            sha256 = entry[3] if entry[:3] == times else digest(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
        found.append(FileId(name, stat.st_size, sha256))
        if max(times[1:]) < started_ns - _RACY_NS:
            index[name] = [*times, sha256]
    if index != known:
        with suppress(OSError):
            write(index_path, json.dumps(index))
    return found


def digest(content: Path | bytes | str) -> str:
    """sha256 of a file, of bytes, or of a text, in hex."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def fingerprint(*parts: Any) -> str:
    """sha256 of plain values (FileIds too), in hex."""
    return digest(json.dumps(parts, sort_keys=True, default=lambda value: [value.name, value.size, value.sha256]))


def held_out(name: str, data: DataConfig) -> bool:
    """Whether the document or image of this name is validation data: a function of the name and the settings alone."""
    if data.val_path is not None:
        return False
    at = share(f"held-out/{name}")  # the prefix parts this from other uses of the hash
    return int(at * data.folds) == data.fold if data.fold is not None else at < data.val_fraction


def share(name: str) -> float:
    """Where the hash of a name falls in [0, 1)."""
    return int(digest(name)[:13], 16) / 16**13


def publish(final: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a new directory and rename it to `final`, so that nobody ever sees half of it.

    When another process published `final` meanwhile, that one stays and ours is dropped: same name, same content.
    Raises DataError when the cache cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for old in final.parent.glob(".making-*"):
            with suppress(OSError):
                if old.stat().st_mtime < time.time() - _ABANDONED_S:
                    shutil.rmtree(old, ignore_errors=True)
        making = final.parent / f".making-{final.name}-{uuid.uuid4().hex[:8]}"
        making.mkdir()
    except OSError as error:
        raise _cannot_write(error, final) from None
    try:
        build(making)
        for path in [*making.rglob("*"), making]:
            _flush(path)
        try:
            making.rename(final)
        except OSError:
            if not final.is_dir():
                raise
        _flush(final.parent)
    except OSError as error:
        if error.filename is None or Path(error.filename).is_relative_to(final.parent):
            raise _cannot_write(error, final) from error
        raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def write(path: Path, text: str) -> None:
    """Replace a small file of the cache at once; readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        new.write_text(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


class Quarantine:
    """Counts what was read, and sets aside what could not be: a line per bad row with its file, line and reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.bad_rows = 0

    def good(self) -> None:
        """Count a row that was read."""
        self.rows += 1

    def bad(self, file: str, line: int | None, reason: str) -> None:
        """Set a row aside. `line` counts from 1; None is the whole file. Raises DataError when there is no hope."""
        self.rows += 1
        self.bad_rows += 1
        with self.path.open("a") as lines:
            lines.write(json.dumps({"file": file, "line": line, "reason": reason}) + "\n")
        if self.bad_rows == self.rows == _HOPELESS:
            raise DataError(
                f"The first {self.rows:,} rows are all bad, so the rest was not read:\n" + _by_file(self.path)
            )


def too_many_bad(rows: int, bad_rows: int, data: DataConfig) -> str | None:
    """What to tell the user when `bad_rows` of `rows` exceed `data.max_bad_fraction`, else None."""
    if bad_rows <= data.max_bad_fraction * rows:
        return None
    return (
        f"{bad_rows:,} of {rows:,} rows are bad, more than data.max_bad_fraction={data.max_bad_fraction:g} allows. "
        f"Repair them, or train without them: data.max_bad_fraction={math.ceil(1000 * bad_rows / rows) / 1000:g}"
    )


def check_bad(rows: int, bad_rows: int, quarantine: Path, data: DataConfig) -> None:
    """Raises DataError, naming files and reasons, when `bad_rows` of `rows` are more than the settings allow."""
    if refusal := too_many_bad(rows, bad_rows, data):
        raise DataError(f"{refusal}\n{_by_file(quarantine)}\n  Each of them: {quarantine}")


def _by_file(quarantine: Path) -> str:
    """The first files of a quarantine, with how much of each is bad and the first reason."""
    files: dict[str, list[dict[str, Any]]] = {}
    with quarantine.open() as lines:
        for record in map(json.loads, lines):
            files.setdefault(record["file"], []).append(record)
    told = []
    for name, records in list(files.items())[:5]:
        line = f"line {records[0]['line']}: " if records[0]["line"] else ""
        told.append(f"  {name}: {len(records):,} bad ({line}{records[0]['reason']})")
    return "\n".join([*told, *([f"  and {len(files) - 5:,} files more"] if len(files) > 5 else [])])


def _flush(path: Path) -> None:
    """To the disk, so that a machine that dies leaves whole directories only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(error: OSError, final: Path) -> DataError:
    return DataError(
        f"The cache {final.parent} cannot be written: {error.strerror or error}. Make room, or name another directory "
        f"with data.cache_dir=PATH."
    )
