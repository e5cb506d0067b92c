"""What the user names, as records: text files, tables, directories, Hugging Face datasets.

Owns: finding and listing what `data.path` means, its fingerprint, and reading it into records in an order that depends
on names and content alone. What cannot be read is reported, with its place and the reason, and moves nothing else.

Does not own: what a record must hold (`text.py`, `chat.py`), or which records are held out.

    a file           .jsonl .ndjson .csv .tsv .parquet .arrow are tables, a record per row; any other file is a text
    a directory      its tables, or its texts, whichever are more bytes; `data.glob` chooses exactly
    a dataset        what `datasets` saved to disk; a copy of a hub repository; a hub id, `org/name[@COMMIT]`
    `stdlib`         the source of this Python's standard library, without its tests

Nothing heavy is imported before a table or dataset is read.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import sysconfig
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data import DataError, cache, hub

if TYPE_CHECKING:
    from train.config import Config, DataConfig

STDLIB = "stdlib"
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
TEXTS = (".txt", ".text", ".md", ".rst", ".py")
"""Taken for text by their name, so that a broken one is reported; others are looked into, and left out if binary."""

_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SPLITS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
_SPLITS |= {"dev": "validation", "eval": "test"}
_BATCH = 256  # rows of a Parquet or Arrow table in memory at once


@dataclass(frozen=True)
class Record:
    """Something that could be read."""

    value: str | dict[str, Any]
    """The text of a text file, or a row of a table. Any text in it can be encoded as UTF-8."""
    file: str
    """Name of the file, relative to what the user named."""
    line: int | None
    """Line or row, from 1; None for a text file."""


@dataclass(frozen=True)
class Source:
    """What the user named, found and listed."""

    path: str
    """As the user wrote it."""
    files: list[tuple[str, Path]] = field(default_factory=list)
    """Name relative to the root, and where it lies; in the order in which they are read."""
    content: str = ""
    """sha256 over names, sizes and content; for a hub dataset over id, commit, configuration and split."""
    dataset: tuple[str, str | None] | None = None
    """(directory or hub id, commit) for what the library `datasets` has to read."""

    def texts(self) -> list[str]:
        """Names of the text files, if there is nothing else."""
        tables = [name for name, path in self.files if path.suffix.lower() in TABLES]
        return [] if tables or self.dataset else [name for name, _ in self.files]


def locate(path: str, cfg: Config, say: Callable[[str], None]) -> Source:
    """Find and fingerprint what `path` means. Raises DataError when there is nothing of that name, or nothing in it."""
    data, root = cfg.data, cache.cache_root(cfg)
    tables = (*TABLES, ".json") if data.kind == "chat" else TABLES
    where = Path(sysconfig.get_path("stdlib")) if path == STDLIB else Path(path).expanduser()
    if where.is_file():
        return _source(path, root, where.parent, [(where.name, where)])
    if not where.is_dir():
        return _of_the_hub(path, data, root, say)
    if path == STDLIB:
        files = [(name, file) for name, file in _walk(where, skip=_NOT_STDLIB) if name.endswith(".py")]
    elif (where / "dataset_dict.json").is_file() or (where / "state.json").is_file():
        files = _saved_to_disk(where, data)
    elif data.glob:
        files = _match(where, data.glob)
    elif data.name or _has_configurations(where):
        listed = _source(path, root, where, _walk(where))
        content = cache.fingerprint(listed.content, data.name, data.split)
        return Source(path, content=content, dataset=(str(where), None))
    else:
        files = _choose(where, tables, data, say)
    if not files:
        taken = f"matches data.glob={data.glob}" if data.glob else "is text or a table (" + " ".join(TABLES) + ")"
        raise DataError(f"{where}: nothing in it {taken}. Give data.path=PATH of a file, or data.glob='**/*.txt'.")
    return _source(path, root, where, files)


def records(
    source: Source, data: DataConfig, bad: Callable[[str, int | None, str], None], columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """Read `source`. `bad(file, line, reason)` is told what could not be read.

    `columns` are the fields that rows must have, and all that is read where the format allows it. A table without one
    of them raises DataError that names those it has.
    """
    if source.dataset:
        yield from _dataset(source, data, bad, columns)
    for name, path in source.files:
        read = _READERS.get(path.suffix.lower(), _text)
        if path.suffix.lower() == ".json" and data.kind == "chat":
            read = _json
        try:
            for line, value in read(path, data, partial(bad, name), columns):
                yield Record(value, name, line)
        except (
            OSError,
            ValueError,
        ) as error:  # a text that is not UTF-8, a table that is not one: pyarrow's are ValueErrors
            bad(name, None, " ".join(str(error).split())[:300])


# ---- Finding ---------------------------------------------------------------------------------------------------------


def _source(path: str, root: Path, where: Path, files: list[tuple[str, Path]]) -> Source:
    return Source(path, files, cache.fingerprint(cache.identify(root, where, files)))


def _walk(where: Path, skip: Collection[str] = ()) -> list[tuple[str, Path]]:
    """The files below a directory in order of their names; none that is hidden, or in a directory named in `skip`."""
    found = []
    for directory, inside, names in os.walk(where):
        inside[:] = [name for name in inside if name not in skip and not _hidden(name)]
        below = "" if directory == str(where) else os.path.relpath(directory, where).replace(os.sep, "/") + "/"
        found += [below + name for name in names if not _hidden(name)]
    return [(name, path) for name in sorted(found) if (path := where / name).is_file()]


def _match(where: Path, pattern: str) -> list[tuple[str, Path]]:
    """The files below a directory that a pattern takes; hidden ones only if the pattern says so."""
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(f"data.glob={pattern}: give a pattern of files below {where}, e.g. '**/*.txt'.")
    try:
        found = sorted((path.relative_to(where).as_posix(), path) for path in where.glob(pattern) if path.is_file())
    except ValueError as error:
        raise DataError(f"data.glob={pattern}: {error}.") from None
    return [(name, path) for name, path in found if "/." in f"/{pattern}" or not _hidden(name)]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def _choose(where: Path, tables: Sequence[str], data: DataConfig, say: Callable[[str], None]) -> list[tuple[str, Path]]:
    """The tables of a directory, or its texts: whichever are more bytes."""
    kinds: dict[str, list[tuple[str, Path]]] = {"tables": [], "texts": [], "files that are not text": []}
    for name, path in _walk(where):
        suffix = path.suffix.lower()
        text = suffix in TEXTS or (suffix not in tables and _looks_like_text(path))
        kinds["tables" if suffix in tables else "texts" if text else "files that are not text"].append((name, path))
    sizes = {kind: sum(path.stat().st_size for _, path in files) for kind, files in kinds.items()}
    taken = "tables" if sizes["tables"] > sizes["texts"] else "texts"
    left = [f"{len(files):,} {kind}" for kind, files in kinds.items() if kind != taken and files]
    if left:
        say(f"{where}: reads {len(kinds[taken]):,} {taken}, leaves {' and '.join(left)} (data.glob chooses otherwise)")
    files = kinds[taken]
    named = {name: _split_of(name) for name, _ in files}
    if taken == "tables" and len(set(named.values()) - {None}) > 1:
        files = [(name, path) for name, path in files if named[name] in (data.split, None)]
        say(f"{where}: reads the {len(files):,} tables of data.split={data.split}, by their names")
    return files


def _looks_like_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(8192)
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except (OSError, UnicodeDecodeError):
        return False
    return b"\0" not in start


def _split_of(name: str) -> str | None:
    """The split that a table's name speaks of, as the hub understands names: `train-00000-of-00002.parquet`."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _saved_to_disk(where: Path, data: DataConfig) -> list[tuple[str, Path]]:
    """The Arrow files of what `datasets` wrote with `save_to_disk`, in its order."""
    if (where / "dataset_dict.json").is_file():
        splits = json.loads((where / "dataset_dict.json").read_text())["splits"]
        if data.split not in splits:
            raise DataError(f"{where} has no split {data.split!r}. Give data.split= one of: {', '.join(splits)}.")
        where = where / data.split
    names = [entry["filename"] for entry in json.loads((where / "state.json").read_text())["_data_files"]]
    return [(name, where / Path(name).name) for name in names]


def _has_configurations(where: Path) -> bool:
    """Whether a directory is a copy of a hub repository that says how its files are to be read."""
    try:
        readme = (where / "README.md").read_text(errors="replace")
    except OSError:
        return False
    header = readme.split("\n---", 1)[0] if readme.startswith("---") else ""
    return "\nconfigs:" in header or "\ndataset_info:" in header


def _of_the_hub(path: str, data: DataConfig, root: Path, say: Callable[[str], None]) -> Source:
    named = hub.parse(path)
    if named is None or Path(path).suffix.lower() in (*TABLES, *TEXTS):
        raise DataError(f"{path}: there is no such file or directory.")
    name, revision = named
    commit = hub.commit("dataset", name, revision, root, say)
    content = cache.fingerprint("hub", name, commit, data.name, data.split)
    return Source(path, content=content, dataset=(name, commit))


# ---- Reading ---------------------------------------------------------------------------------------------------------

Rows = Iterator[tuple[int | None, "str | dict[str, Any]"]]
Bad = Callable[["int | None", str], None]


def _text(path: Path, data: DataConfig, bad: Bad, columns: Sequence[str] | None) -> Rows:
    if (size := path.stat().st_size) > data.max_row_bytes:
        return bad(None, _too_long(size, data))
    try:
        yield None, path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad(None, _not_utf8(error))


def _jsonl(path: Path, data: DataConfig, bad: Bad, columns: Sequence[str] | None) -> Rows:
    number, limit = 0, data.max_row_bytes
    with path.open("rb") as file:
        while line := file.readline(limit + 2):
            number, size, piece = number + 1, len(line), line
            while piece and not piece.endswith(b"\n"):  # too long to be kept: count the rest of it, a piece at a time
                piece = file.readline(1 << 20)
                size += len(piece)
            if (size := size - piece.endswith(b"\n")) > limit:
                bad(number, _too_long(size, data))
            elif line.strip():
                yield from _parsed(number, line, bad)


def _parsed(number: int, line: bytes, bad: Bad) -> Rows:
    """A line of JSON, if it is an object."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if not isinstance(value, dict):
            return bad(number, f"not a JSON object but a {type(value).__name__}")
        if rb"\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return bad(number, _not_utf8(error))
    except UnicodeEncodeError:
        return bad(number, "half of a surrogate pair")
    except (ValueError, RecursionError) as error:
        return bad(number, f"not JSON: {error}")
    yield number, value


def _json(path: Path, data: DataConfig, bad: Bad, columns: Sequence[str] | None) -> Rows:
    """A .json file: an array of objects, or JSON lines all the same."""
    with path.open("rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
            yield from _jsonl(path, data, bad, columns)
            return
    for number, value in enumerate(json.loads(path.read_bytes().decode("utf-8-sig")), 1):
        yield from _parsed(number, json.dumps(value).encode(), bad)


def _csv(path: Path, data: DataConfig, bad: Bad, columns: Sequence[str] | None) -> Rows:
    limit = csv.field_size_limit(min(data.max_row_bytes, 2**31 - 1))
    try:
        # Bytes that are not UTF-8 become lone surrogates, so that only the rows that hold them are lost.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(rows, [])
            _must_have(header, columns, path)
            while True:
                line = rows.line_num + 1
                try:
                    row = next(rows, None)
                    if row is None:
                        return
                    "".join(row).encode()
                except UnicodeEncodeError:
                    bad(line, "invalid UTF-8")
                except csv.Error as error:
                    bad(line, f"not CSV: {error}")
                else:
                    if row and len(row) != len(header):
                        bad(line, f"{len(row)} fields, where the header has {len(header)}")
                    elif row:
                        yield line, dict(zip(header, row))
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, data: DataConfig, bad: Bad, columns: Sequence[str] | None) -> Rows:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        _must_have(file.schema_arrow.names, columns, path)
        yield from _batches(file.iter_batches(_BATCH, columns=columns), bad)


def _arrow(path: Path, data: DataConfig, bad: Bad, columns: Sequence[str] | None) -> Rows:
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        try:
            reader = pyarrow.ipc.open_stream(mapped)
            batches: Iterator[Any] = iter(reader)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        _must_have(reader.schema.names, columns, path)
        yield from _batches((batch.select(columns) if columns else batch for batch in batches), bad)


def _dataset(
    source: Source, data: DataConfig, bad: Callable[[str, int | None, str], None], columns: Sequence[str] | None
) -> Iterator[Record]:
    assert source.dataset is not None
    name, commit = source.dataset
    try:
        import datasets
    except ImportError:
        raise DataError(f"Reading {name} takes the library `datasets`: pip install 'gearshift[datasets]'.") from None
    try:
        rows = datasets.load_dataset(name, data.name, split=data.split, revision=commit)
    except Exception as error:
        raise hub.explain(error, "dataset", name, commit) from error
    _must_have(rows.column_names, columns, name)
    chosen = rows.select_columns(list(columns)) if columns else rows
    batches = (batch for table in chosen.with_format("arrow").iter(_BATCH) for batch in table.to_batches())
    for line, value in _batches(batches, partial(bad, name)):
        yield Record(value, name, line)


def _batches(batches: Iterator[Any], bad: Bad) -> Rows:
    """Rows of Arrow batches. One that is not UTF-8 does not take the others of its batch with it."""
    number = 0
    for batch in batches:
        try:
            rows: list[Any] = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [None] * batch.num_rows
        for i, row in enumerate(rows):
            number += 1
            try:
                yield number, batch.slice(i, 1).to_pylist()[0] if row is None else row
            except UnicodeDecodeError as error:
                bad(number, _not_utf8(error))


def _must_have(names: Sequence[str], columns: Sequence[str] | None, where: Path | str) -> None:
    missing = [column for column in columns or () if column not in names]
    if missing:
        raise DataError(
            f"{where} has no column {missing[0]!r}. It has: {', '.join(names) or 'none'}. Name the one that holds the "
            f"text: data.text_field=NAME."
        )


def _too_long(size: int, data: DataConfig) -> str:
    return f"{size:,} bytes, more than data.max_row_bytes={data.max_row_bytes}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at {error.start:,}"


_READERS: dict[str, Callable[[Path, DataConfig, Bad, Sequence[str] | None], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
