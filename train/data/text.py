"""Text as a language model reads it: one stream of tokens per source, cut into rows.

Owns: the stream (each document preceded by the separator), its shards on disk, the rows, which documents are held out,
and what compressors without a neural network make of the held-out bytes.

Does not own: reading files (`documents.py`), tokenizers (`tokenizer.py`), chats (`chat.py`).

The validation stream is predicted from its second token to its last, each exactly once, separators included: so the sum
of the losses over the number of held-out bytes is a bound on how far the text could be compressed. Rows are cut when
they are read, so one prepared directory serves every `data.seq_len`:

    prepared.json  tokenizer.json ...  train-0-00000.bin  val-00000.bin ...      little-endian uint16 or uint32
"""

from __future__ import annotations

import json
import lzma
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data import DataError, Prepared, cache, documents, tokenizer
from train.data.documents import Record, Source

if TYPE_CHECKING:
    from train.config import Config, DataConfig
    from train.data import Dataset

FORMAT = 1
SHARD_BYTES = 1 << 31  # many would be many open files
IGNORE = -100
"""Label that carries no loss."""

BASELINE_BYTES = 32 << 20
"""With more held-out text there are no baselines: `xz` takes a second per 2 MB."""

_BATCH_CHARACTERS = 4 << 20  # documents tokenised together


def prepare(cfg: Config, say: Callable[[str], None]) -> Prepared:
    """Tokenise what `data.path` (or `sources`, `val_path`) names, unless it is done already. Raises DataError."""
    data = cfg.data
    paths = [source.path for source in data.sources] or [data.path or ""]
    if not all(paths):
        raise DataError("data.path is not set: give a file, a directory, a hub id, or data.path=stdlib.")
    sources = [documents.locate(path, cfg, say) for path in paths]
    held_out = documents.locate(data.val_path, cfg, say) if data.val_path is not None else None
    origin = tokenizer.locate(cfg, say)
    split = (
        [held_out.content] if held_out else [data.folds, data.fold] if data.fold is not None else [data.val_fraction]
    )
    content = cache.fingerprint([source.content for source in sources], split)
    name = cache.fingerprint(FORMAT, content, data.text_field, data.max_row_bytes, origin.identity)
    directory = cache.cache_root(cfg) / "text" / name[:32]
    if not (directory / "prepared.json").is_file():
        cache.publish(directory, lambda new: _build(new, sources, held_out, origin, cfg, say))
    found = json.loads((directory / "prepared.json").read_text())
    cache.check_bad(found["rows"], found["bad_rows"], directory / cache.QUARANTINE, data)
    if found["bad_rows"]:
        say(f"{found['bad_rows']:,} of {found['rows']:,} rows are bad and left out; see {directory / cache.QUARANTINE}")
    prepared = Prepared(
        "text",
        directory,
        {"data": content, "tokenizer": found.pop("tokenizer_sha256")},
        {**found, "tokenizer": str(directory)},
    )
    train, val = open(prepared, cfg)
    prepared.info["train_samples"], prepared.info["val_samples"] = [len(rows) for rows in train], len(val)
    return prepared


def open(prepared: Prepared, cfg: Config) -> tuple[list[Dataset], Dataset]:
    """A dataset of rows per source, and that of the held-out stream. Raises DataError when one has no row."""
    info, length, content = prepared.info, cfg.data.seq_len, prepared.fingerprints["data"]
    streams = [Stream(prepared.directory, stream, info["dtype"]) for stream in info["streams"]]
    train = [Rows(stream, length, content) for stream in streams[:-1]]
    for number, rows in enumerate(train):
        if not len(rows):
            which = f"data.sources[{number}]" if cfg.data.sources else "data.path"
            raise DataError(
                f"{which} gives {len(rows.stream):,} tokens for training, too few for one row: data.seq_len={length} "
                f"takes {length + 1:,}. Give more text, or a shorter data.seq_len."
            )
    val = Rows(streams[-1], length, content, whole=True)
    if not len(val):
        raise DataError(
            "No text is held out for validation. Give data.val_path=PATH, or hold out more: data.val_fraction is "
            f"{cfg.data.val_fraction:g} of {info['train_documents'] + info['val_documents']:,} documents."
        )
    return [*train], val


def show(prepared: Prepared, cfg: Config) -> list[str]:
    """The first three samples of the run; what carries loss stands between « and »."""
    from train.data import weights
    from train.order import Order

    train, _ = open(prepared, cfg)
    speller = tokenizer.Tokenizer(prepared.directory)
    first = Order([len(rows) for rows in train], weights(cfg), 3, cfg.seed).ids(0)
    shown = []
    for source, index in zip(first.source.tolist(), first.index.tolist()):
        row = train[source].get(index, 0, cfg.seed)
        carry = int((row["labels"] != IGNORE).sum())
        text = speller.marked(row["input_ids"], row["labels"])
        shown.append(f"source {source}, row {index:,}: {cfg.data.seq_len:,} tokens, {carry:,} carry loss\n{text}")
    return shown


class Stream:
    """A sequence of tokens in shards on disk, mapped into memory as it is read."""

    def __init__(self, directory: Path, shards: list[tuple[str, int]], dtype: str) -> None:
        """`shards` are file names and their numbers of tokens. Raises DataError when a file is not as long as that."""
        self.paths = [directory / name for name, _ in shards]
        self.dtype = np.dtype(dtype)
        self.ends = list(accumulate((tokens for _, tokens in shards), initial=0))
        self._mapped: dict[int, np.ndarray] = {}
        for path, (_, tokens) in zip(self.paths, shards):
            if not path.is_file() or path.stat().st_size != tokens * self.dtype.itemsize:
                raise DataError(f"{path} is damaged. Delete {directory} and prepare again.")

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64; fewer where the stream ends."""
        stop = min(stop, len(self))
        tokens = np.empty(max(stop - start, 0), np.int64)
        at, shard = 0, bisect_right(self.ends, start) - 1
        while at < len(tokens):
            if shard not in self._mapped:
                self._mapped[shard] = np.memmap(self.paths[shard], self.dtype, "r").view(np.ndarray)
            part = self._mapped[shard][start + at - self.ends[shard] :][: len(tokens) - at]
            tokens[at : at + len(part)] = part
            at, shard = at + len(part), shard + 1
        return tokens


class Rows:
    """Rows of `length` tokens, each beginning with the last target of the one before.

    A sample is `input_ids` int64[length] and `labels` int64[length], already shifted: `labels[t]` is the target of
    position t. The last, short row is dropped in training; with `whole` it is kept, its missing labels IGNORE.
    """

    def __init__(self, stream: Stream, length: int, fingerprint: str, whole: bool = False) -> None:
        self.stream, self.length, self.fingerprint = stream, length, fingerprint
        self.ignore = {"labels": IGNORE}
        targets = max(len(stream) - 1, 0)
        self._len = -(-targets // length) if whole else targets // length

    def __len__(self) -> int:
        return self._len

    def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Row `index`; the same in every epoch."""
        tokens = self.stream.read(index * self.length, (index + 1) * self.length + 1)
        labels = np.full(self.length, IGNORE, np.int64)
        labels[: len(tokens) - 1] = tokens[1:]
        inputs = np.full(self.length, tokens[-1], np.int64)
        inputs[: len(tokens) - 1] = tokens[:-1]
        return {"input_ids": inputs, "labels": labels}


# ---- Preparing -------------------------------------------------------------------------------------------------------


def _build(
    new: Path,
    sources: list[Source],
    held_out: Source | None,
    origin: tokenizer.Origin,
    cfg: Config,
    say: Callable[[str], None],
) -> None:
    """Fill the directory `new`."""

    def read(quarantine: cache.Quarantine | None = None) -> Iterator[tuple[int, str]]:
        """(number of the stream, document); the last stream is what is held out."""
        for number, source in enumerate(sources):
            for text, held in _documents(source, cfg.data, quarantine):
                yield len(sources) if held else number, text
        if held_out is not None:
            for text, _ in _documents(held_out, cfg.data, quarantine):
                yield len(sources), text

    size = sum(path.stat().st_size for source in sources for _, path in source.files)
    what = ", ".join(source.path for source in sources)
    say(f"Preparing {what}{f' ({size / 1e6:,.1f} MB)' if size else ''}: once, for every run on the same data")
    if origin.word == "bpe":
        say(f"  training a byte-level BPE of {cfg.data.tokenizer_vocab_size:,} entries")
    speller = tokenizer.make(origin, new, lambda: (text for n, text in read() if n < len(sources)), size, cfg)

    quarantine = cache.Quarantine(new / cache.QUARANTINE)
    dtype = np.dtype("<u2" if speller.vocab_size <= 1 << 16 else "<u4")
    streams = [_Writer(new, name, dtype) for name in (*(f"train-{n}" for n in range(len(sources))), "val")]
    baselines = Baselines()
    for batch in _batches(read(quarantine)):
        for (number, text), ids in zip(batch, speller.encode([text for _, text in batch])):
            content = text.encode()
            streams[number].add(np.concatenate([[speller.separator], ids]), len(content))
            baselines.add(content, held=number == len(sources))
    for stream in streams:
        stream.close()
    for source in [*sources, *([held_out] if held_out else [])]:
        if documents.locate(source.path, cfg, lambda _: None).content != source.content:
            raise DataError(f"{source.path} changed while it was read. Start again once nothing writes to it.")
    train, val = streams[:-1], streams[-1]
    found: dict[str, Any] = {
        "rows": quarantine.rows,
        "bad_rows": quarantine.bad_rows,
        "train_documents": sum(stream.documents for stream in train),
        "train_bytes": sum(stream.bytes for stream in train),
        "train_tokens": sum(stream.tokens for stream in train),
        "val_documents": val.documents,
        "val_bytes": val.bytes,
        "val_tokens": val.tokens,
        "val_targets": max(val.tokens - 1, 0),
        "vocab_size": speller.vocab_size,
        "separator": speller.separator,
        "tokenizer_sha256": speller.content,
        "streams": [stream.shards for stream in streams],
        "dtype": dtype.str,
        "baselines": baselines.results(),
    }
    say(
        f"  {found['train_documents']:,} documents, {found['train_tokens']:,} tokens of "
        f"{found['train_bytes'] / max(found['train_tokens'], 1):.2f} bytes; held out: {val.documents:,} documents, "
        f"{val.bytes / 1e6:,.2f} MB"
    )
    (new / "prepared.json").write_text(json.dumps(found, indent=1))


def _batches(read: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Documents in batches of about equal size."""
    batch: list[tuple[int, str]] = []
    waiting = 0
    for document in read:
        batch.append(document)
        waiting += len(document[1])
        if waiting >= _BATCH_CHARACTERS:
            yield batch
            batch, waiting = [], 0
    yield batch


def _documents(source: Source, data: DataConfig, quarantine: cache.Quarantine | None) -> Iterator[tuple[str, bool]]:
    """The documents of a source that are not empty, and whether each is held out. Bad rows go into the quarantine."""
    bad = quarantine.bad if quarantine else lambda *_: None
    names = source.texts()
    held = _held_texts(names, data)
    for record in documents.records(source, data, bad, [data.text_field]):
        try:
            text = _text_of(record, data)
        except ValueError as error:
            bad(record.file, record.line, str(error))
            continue
        if quarantine:
            quarantine.good()
        if not text:
            continue
        if len(names) == 1 and data.val_path is None:
            yield from _cut(text, data)
        elif record.line is None:
            yield text, record.file in held
        else:
            # By content: which rows are held out does not depend on rows before, nor does a copy end up on both sides.
            yield text, cache.held_out(text, data)


def _text_of(record: Record, data: DataConfig) -> str:
    """The text of a record. Raises ValueError that says why there is none."""
    text = record.value
    if isinstance(text, dict):
        if data.text_field not in text:
            raise ValueError(f"no field {data.text_field!r} (data.text_field); it has {', '.join(text) or 'none'}")
        text = text[data.text_field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise ValueError(f"field {data.text_field!r} is {kind}, not a text")
    if len(text) * 4 > data.max_row_bytes and (size := len(text.encode())) > data.max_row_bytes:
        raise ValueError(f"{size:,} bytes, more than data.max_row_bytes={data.max_row_bytes}")
    return text


def _held_texts(names: list[str], data: DataConfig) -> set[str]:
    """The text files that are held out by their names; of few files, at least one on either side."""
    held = {name for name in names if cache.held_out(name, data)}
    if data.val_path is None and len(names) > 1:
        drawn = sorted(names, key=lambda name: cache.share(f"{data.fold}/{name}"))
        held = held or {drawn[0]}
        held = held if len(held) < len(names) else held - {drawn[-1]}
    return held


def _cut(text: str, data: DataConfig) -> Iterator[tuple[str, bool]]:
    """A document that is all there is, in parts: its end (or the part of the fold) is held out. Cut between lines."""
    begin, end = 1 - data.val_fraction, 1.0
    if data.fold is not None:
        begin, end = data.fold / data.folds, (data.fold + 1) / data.folds
    places = [round(len(text) * share) for share in (begin, end)]
    first, second = (text.rfind("\n", 0, at) + 1 or at if at < len(text) else at for at in places)
    parts = ((text[:first], False), (text[first:second], True), (text[second:], False))
    yield from ((part, held) for part, held in parts if part)


class _Writer:
    """Appends documents to the shards of a stream."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.directory, self.name, self.dtype = directory, name, dtype
        self.shards: list[tuple[str, int]] = []
        self.documents = self.bytes = self.tokens = 0
        self._file: Any = None

    def add(self, ids: np.ndarray, size: int) -> None:
        """Append a document of `size` bytes as text."""
        self.documents, self.bytes, self.tokens = self.documents + 1, self.bytes + size, self.tokens + len(ids)
        fit = SHARD_BYTES // self.dtype.itemsize
        while len(ids):
            if not self.shards or self.shards[-1][1] == fit:
                self.close()
                self.shards.append((f"{self.name}-{len(self.shards):05d}.bin", 0))
                self._file = (self.directory / self.shards[-1][0]).open("wb")
            name, held = self.shards[-1]
            part, ids = ids[: fit - held], ids[fit - held :]
            self._file.write(part.astype(self.dtype).tobytes())
            self.shards[-1] = (name, held + len(part))

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._file.close()


# ---- Baselines -------------------------------------------------------------------------------------------------------


class Baselines:
    """What the held-out bytes cost without a neural network: a byte n-gram of the training text, and `xz -9`.

    The n-gram gives byte c after bytes ab the probability (n(abc) + 1) / (n(ab) + 256), with n counted in the training
    documents; two zeros stand before the first byte of a document.
    """

    def __init__(self) -> None:
        self._counts: np.ndarray | None = np.zeros(1 << 24, np.int64)
        self._training: list[bytes] = []
        self._held: list[bytes] = []
        self._size = {False: 0, True: 0}

    def add(self, document: bytes, held: bool) -> None:
        """Count a training document, or keep a held-out one; with too many bytes of those there are no baselines."""
        if self._counts is None:
            return
        (self._held if held else self._training).append(document)
        self._size[held] += len(document)
        if self._size[True] > BASELINE_BYTES:
            self._counts, self._held, self._training = None, [], []
        elif self._size[False] > _BATCH_CHARACTERS:
            self._count()

    def results(self) -> dict[str, float] | None:
        """Bits per held-out byte: `ngram2_bpb` and `xz9_bpb`. None when nothing, or too much, is held out."""
        if self._counts is None or not self._held:
            return None
        self._count()
        trigrams = _trigrams(self._held)
        seen, context = self._counts[trigrams], self._counts.reshape(-1, 256).sum(1)[trigrams >> 8]
        packed = lzma.compress(b"".join(self._held), preset=9)
        return {
            "ngram2_bpb": round(float(np.log2((context + 256) / (seen + 1)).mean()), 4),
            "xz9_bpb": round(8 * len(packed) / self._size[True], 4),
        }

    def _count(self) -> None:
        assert self._counts is not None
        if self._training:
            np.add.at(self._counts, _trigrams(self._training), 1)
        self._training, self._size[False] = [], 0


def _trigrams(texts: list[bytes]) -> np.ndarray:
    """Each byte of the documents with the two before it, as a number below 2^24."""
    stream = np.frombuffer(b"".join(b"\0\0" + text for text in texts), np.uint8).astype(np.int64)
    starts = np.cumsum([0, *(len(text) + 2 for text in texts[:-1])])
    real = np.ones(len(stream), bool)
    real[starts] = real[starts + 1] = False
    return ((stream[:-2] << 16) | (stream[1:-1] << 8) | stream[2:])[real[2:]]
