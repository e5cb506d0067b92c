"""Chats as a language model is tuned on them: rendered by the model's template, loss on the assistant's words alone, packed.

Owns: the shapes in which chats come, which tokens carry loss (and the refusal when that is not certain), packing into rows
whose documents do not see each other, and the chats made of the standard library's functions and docstrings.

Does not own: reading files (`documents.py`), tokenizers (`tokenizer.py`), the attention mask (`tasks/causal_lm.py`).

Which tokens carry loss is taken from the template's own `{% generation %}` markers; without them, from the difference
between the rendered chat before and after each answer, which is certain only if the one begins with the other. A chat for
which neither holds is a bad row.

On disk lie documents, not rows, so one prepared directory serves every `data.seq_len`:

    prepared.json  tokenizer.json ...  {train-0,val}-ids.bin  -carry.bin (uint8: 1 carries loss)  -ends.bin (int64)
"""

from __future__ import annotations

import ast
import datetime
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data import DataError, Prepared, cache, documents, tokenizer
from train.data.documents import Record, Source

if TYPE_CHECKING:
    from train.config import Config
    from train.data import Dataset

FORMAT = 2
IGNORE = -100
"""Label that carries no loss."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_LOST = (
    "tools",
    "functions",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
)
_TODAY = datetime.date(2026, 1, 1)  # of templates that say it: the same chats are the same tokens on every day
_BATCH = 256  # chats tokenised together
Messages = list[dict[str, str]]


def prepare(cfg: Config, say: Callable[[str], None]) -> Prepared:
    """Render and tokenise the chats that `data.path` (or `sources`, `val_path`) names. Raises DataError."""
    data = cfg.data
    paths = [source.path for source in data.sources] or [data.path or ""]
    if not all(paths):
        raise DataError("data.path is not set: give a file of chats (.jsonl, .parquet), a directory, or a hub id.")
    sources = [documents.locate(path, cfg, say) for path in paths]
    held_out = documents.locate(data.val_path, cfg, say) if data.val_path is not None else None
    origin = tokenizer.locate(cfg, say)
    split: list[Any] = [data.folds, data.fold] if data.fold is not None else [data.val_fraction]
    content = cache.fingerprint([s.content for s in sources], [held_out.content] if held_out else split)
    name = cache.fingerprint("chat", FORMAT, content, data.max_row_bytes, origin.identity)
    directory = cache.cache_root(cfg) / "chat" / name[:32]
    if not (directory / "prepared.json").is_file():
        cache.publish(directory, lambda new: _build(new, sources, held_out, origin, cfg, say))
    found = json.loads((directory / "prepared.json").read_text())
    cache.check_bad(found["rows"], found["bad_rows"], directory / cache.QUARANTINE, data)
    if found["bad_rows"]:
        say(
            f"{found['bad_rows']:,} of {found['rows']:,} chats are bad and left out; see {directory / cache.QUARANTINE}"
        )
    prepared = Prepared("chat", directory, {"data": content, "tokenizer": found.pop("tokenizer_sha256")},
                        {**found, "tokenizer": str(directory)})  # fmt: skip
    train, val = _rows(prepared, cfg)
    prepared.info["train_samples"], prepared.info["val_samples"] = [len(rows) for rows in train], len(val)
    long = sum(rows.too_long for rows in [*train, val])
    fill = min(rows.fill for rows in train)
    say(
        f"{sum(map(len, train)):,} rows of {cfg.data.seq_len:,} positions to train on, {fill:.1%} of them filled; "
        f"held out: {len(val):,}"
    )
    if long:
        say(
            f"{long:,} chats are longer than data.seq_len={data.seq_len} tokens and left out; a longer data.seq_len keeps them"
        )
    prepared.info["too_long"] = long
    prepared.info["fill"] = round(fill, 4)
    return prepared


def open(prepared: Prepared, cfg: Config) -> tuple[list[Dataset], Dataset]:
    """A dataset of packed rows per source, and that of the held-out chats. Raises DataError when one has no row."""
    train, val = _rows(prepared, cfg)
    return [*train], val


def _rows(prepared: Prepared, cfg: Config) -> tuple[list[Rows], Rows]:
    content = prepared.fingerprints["data"]
    *names, held = prepared.info["streams"]
    made = [Rows(prepared.directory / name, cfg.data.seq_len, content, pack=cfg.data.pack) for name in (*names, held)]
    for rows, name in zip(made, (*names, held)):
        if not len(rows):
            what = "held out for validation" if name == held else "left for training"
            raise DataError(
                f"No chat is {what}: {rows.too_long:,} are longer than data.seq_len={cfg.data.seq_len}. Give more chats, "
                "a longer data.seq_len, or data.val_path=PATH."
            )
    return made[:-1], made[-1]


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
        used = int((row["document"] > 0).sum())
        carry = int((row["labels"] != IGNORE).sum())
        chats = int(row["document"].max())
        parts = [row["document"] == number for number in range(1, chats + 1)]
        text = "\n".join(speller.marked(row["input_ids"][part], row["labels"][part]) for part in parts)
        shown.append(f"source {source}, row {index:,}: {chats} chats, {used:,} of {cfg.data.seq_len:,} positions used, "
                     f"{carry:,} carry loss\n{text}")  # fmt: skip
    return shown


class Rows:
    """Rows of `length` positions, each holding whole chats.

    A sample is `input_ids`, `labels` (already shifted), `position_ids` (from 0 in each chat), int64[length], and
    `document` int32[length]: which chat of the row a position belongs to, from 1; 0 for what is left at the end.
    A chat of n tokens takes n - 1 positions: its last token is only a target.
    """

    def __init__(self, stem: Path, length: int, fingerprint: str, *, pack: bool) -> None:
        self.length, self.fingerprint, self.ignore = length, fingerprint, {"labels": IGNORE}
        ends = np.fromfile(f"{stem}-ends.bin", np.int64)
        self._starts = np.concatenate([[0], ends])
        self._ids = _mapped(f"{stem}-ids.bin", np.uint32)
        self._carry = _mapped(f"{stem}-carry.bin", np.uint8)
        sizes = np.diff(self._starts) - 1
        fits = np.flatnonzero(sizes <= length)
        self.too_long = len(sizes) - len(fits)
        bins = best_fit(sizes[fits], length) if pack else np.arange(len(fits))
        order = np.argsort(bins, kind="stable")
        self._chats = fits[order]
        self._rows = np.searchsorted(bins[order], np.arange(bins.max(initial=-1) + 2))
        self.fill = float(sizes[fits].sum() / max(1, len(self) * length))
        """Share of all positions that a chat takes."""

    def __len__(self) -> int:
        return len(self._rows) - 1

    def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Row `index`; the same in every epoch."""
        inputs, positions = np.zeros(self.length, np.int64), np.zeros(self.length, np.int64)
        labels, document = np.full(self.length, IGNORE, np.int64), np.zeros(self.length, np.int32)
        at = 0
        for number, chat in enumerate(self._chats[self._rows[index] : self._rows[index + 1]], 1):
            ids = self._ids[self._starts[chat] : self._starts[chat + 1]].astype(np.int64)
            carry = self._carry[self._starts[chat] : self._starts[chat + 1]]
            here = slice(at, at + len(ids) - 1)
            inputs[here], labels[here] = ids[:-1], np.where(carry[1:], ids[1:], IGNORE)
            positions[here], document[here] = np.arange(len(ids) - 1), number
            at += len(ids) - 1
        positions[at:] = np.arange(self.length - at)
        return {"input_ids": inputs, "labels": labels, "position_ids": positions, "document": document}


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the row (from 0) of each size, no row above `capacity`. All sizes must be at most that.

    The longest first, each into the row with the least room that still takes it. Documents of one length are placed
    together, which is the same: after one of them, the row it went to is still the tightest as long as it takes another.
    So the work grows with the number of lengths, not of documents.
    """
    order = np.argsort(-sizes, kind="stable")
    lengths, first, counts = np.unique(-sizes[order], return_index=True, return_counts=True)
    row_of = np.empty(len(sizes), np.int64)
    rows = 0
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    open_rooms = np.zeros(capacity + 1, bool)
    for length, start, count in zip((-lengths).tolist(), first.tolist(), counts.tolist()):
        while count:
            tight = length + int(open_rooms[length:].argmax())
            if open_rooms[tight]:
                found = np.concatenate(room[tight])
                room[tight], open_rooms[tight] = [], False
            else:
                tight = capacity
                found = np.arange(rows, rows + math.ceil(count / (capacity // max(length, 1) or 1)))
                rows += len(found)
            each = tight // length if length else count
            used, left = found[: math.ceil(count / each)], found[math.ceil(count / each) :]
            placed = min(count, each * len(used))
            row_of[order[start : start + placed]] = np.repeat(used, each)[:placed]
            start, count = start + placed, count - placed
            last = placed - each * (len(used) - 1)  # in the last row used; the others are filled as far as they go
            for part, taken in ((used[:-1], each), (used[-1:], last), (left, 0)):
                if len(part):
                    room[tight - taken * length].append(part)
                    open_rooms[tight - taken * length] = True
    return row_of


def _mapped(path: str, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if Path(path).stat().st_size else np.empty(0, dtype)


# ---- Preparing -------------------------------------------------------------------------------------------------------


def _build(new: Path, sources: list[Source], held_out: Source | None, origin: tokenizer.Origin, cfg: Config,
           say: Callable[[str], None]) -> None:  # fmt: skip
    """Fill the directory `new`."""
    quarantine = cache.Quarantine(new / cache.QUARANTINE)
    say(f"Preparing chats of {', '.join(s.path for s in sources)}: once, for every run on the same data")

    def read(bad: Any) -> Iterator[tuple[int, Messages, Record]]:
        for number, source in enumerate([*sources, *([held_out] if held_out else [])]):
            for record in _records(source, cfg, bad):
                try:
                    messages = messages_of(record.value)
                except ValueError as error:
                    bad(record.file, record.line, str(error))
                    continue
                key = json.dumps(messages, ensure_ascii=False)
                if len(key) > cfg.data.max_row_bytes:
                    bad(record.file, record.line, f"longer than data.max_row_bytes={cfg.data.max_row_bytes}")
                    continue
                held = number == len(sources) or (held_out is None and cache.held_out(key, cfg.data))
                yield (len(sources) if held else number), messages, record

    def texts() -> Iterator[str]:  # a BPE of our own learns from what is said
        for number, messages, _ in read(lambda *_: None):
            if number < len(sources):
                yield "\n".join(m["content"] for m in messages)

    size = sum(path.stat().st_size for source in sources for _, path in source.files)
    speller = tokenizer.make(origin, new, texts, size, cfg)
    template = Template(new)
    names = [*(f"train-{n}" for n in range(len(sources))), "val"]
    writers = [_Writer(new / name) for name in names]
    waiting: list[tuple[int, str, list[tuple[int, int]], Record]] = []

    def flush() -> None:
        found = encode(speller, [(text, spans) for _, text, spans, _ in waiting])
        for (number, _, _, record), (ids, carry) in zip(waiting, found):
            if len(ids) < 2 or not carry[1:].any():
                quarantine.bad(record.file, record.line, "no word of an assistant in it carries loss")
                continue
            quarantine.good()
            writers[number].add(ids, carry)
        waiting.clear()

    for number, messages, record in read(quarantine.bad):
        try:
            text, spans = template.render(messages)
        except ValueError as error:
            quarantine.bad(record.file, record.line, str(error))
            continue
        waiting.append((number, text, spans, record))
        if len(waiting) == _BATCH:
            flush()
    flush()
    for writer in writers:
        writer.close()
    train, val = writers[:-1], writers[-1]
    found = {
        "rows": quarantine.rows,
        "bad_rows": quarantine.bad_rows,
        "train_documents": sum(w.documents for w in train),
        "train_tokens": sum(w.tokens for w in train),
        "train_targets": sum(w.targets for w in train),
        "val_documents": val.documents,
        "val_tokens": val.tokens,
        "val_targets": val.targets,
        "vocab_size": speller.vocab_size,
        "separator": speller.separator,
        "tokenizer_sha256": speller.content,
        "streams": names,
        "mask": template.how,
    }
    say(f"  {found['train_documents']:,} chats, {found['train_tokens']:,} tokens, of which {found['train_targets']:,} carry loss "
        f"({template.how}); held out: {val.documents:,} chats")  # fmt: skip
    (new / "prepared.json").write_text(json.dumps(found, indent=1))


def encode(
    speller: tokenizer.Tokenizer, chats: list[tuple[str, list[tuple[int, int]]]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each chat as `Template` renders it the tokens, uint32 [n], and which of them carry loss, uint8 [n]."""
    # Unlike in plain text, the words of a template that spell special tokens are special tokens.
    speller.backend.encode_special_tokens = False
    made = []
    for (_, spans), found in zip(chats, speller.backend.encode_batch([c[0] for c in chats], add_special_tokens=False)):
        begins, ends = np.array(found.offsets, np.int64).reshape(-1, 2).T
        carry = np.zeros(len(found.ids), np.uint8)
        for begin, end in spans:
            carry[(begins >= begin) & (ends <= end) & (ends > begins)] = 1
        made.append((np.array(found.ids, np.uint32), carry))
    return made


def messages_of(row: Any, *, answered: bool = True) -> Messages:
    """The messages of a row: `messages`, ShareGPT's `conversations`, or `prompt` and `completion`.

    Raises ValueError that says what the row has instead, or what of it would be lost: only words are trained on.
    """
    if not isinstance(row, dict):
        raise ValueError("not a row with fields")
    _refuse_lost(row)
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        turns = row[name]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{name} is not a list of turns")
        found = (
            [{"role": "system", "content": row["system"]}]
            if isinstance(row.get("system"), str) and row["system"]
            else []
        )
        for turn in turns:
            if not isinstance(turn, dict):
                raise ValueError(f"a turn of {name} is a {type(turn).__name__}, not an object")
            _refuse_lost(turn)
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            if not isinstance(role, str) or not isinstance(content, str):
                raise ValueError(f"a turn of {name} has the fields {', '.join(turn)}; a role and a text are needed")
            found.append({"role": _ROLES.get(role, role), "content": content})
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return messages_of({"messages": [*prompt, *completion]})
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError("prompt and completion are not both texts")
        found = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    else:
        raise ValueError(
            f"no messages, no conversations, no prompt and completion; its fields are {', '.join(map(str, row)) or 'none'}"
        )
    if answered and not any(m["role"] == "assistant" for m in found):
        raise ValueError(f"nobody answers: the roles are {', '.join(m['role'] for m in found)}")
    return found


def _refuse_lost(fields: dict[str, Any]) -> None:
    if lost := [name for name in _LOST if fields.get(name) not in (None, "", [], {}, "[]")]:
        raise ValueError(f"{', '.join(lost)} would be lost: only a role and a text are trained on")


class Template:
    """A chat template, and which characters of a rendered chat the assistant says. Where it says today's date, that is
    1 January 2026 on every day."""

    def __init__(self, directory: Path) -> None:
        """directory: a tokenizer's. Raises DataError when it has no template."""
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        file = directory / "chat_template.jinja"
        source = file.read_text() if file.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((t["template"] for t in source if t.get("name") == "default"), None)
        if not isinstance(source, str):
            raise DataError("This tokenizer has no chat template. Give one: data.chat_template=FILE.")
        if "strftime_now" in source:  # today's date would be other tokens tomorrow
            day = "".join(f"|replace('%{c}', '{_TODAY.strftime(f'%{c}')}')" for c in "aAbBdejmyYHIMSpFDT")
            source = f"{{%- macro strftime_now(format) -%}}{{{{ format{day} }}}}{{%- endmacro -%}}{source}"
        self.source = source
        self.words = tokenizer.special_tokens(directory)
        self.marked = "generation" in source and "endgeneration" in source
        self.how = "by the template's generation marks" if self.marked else "by the difference that each answer makes"

    def render(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """(the chat as text, [begin, end) characters that carry loss). Raises ValueError where that is not certain."""
        if self.marked:
            text, spans = self._render(messages, prompt=False)
            return text, [span for span in spans if span[1] > span[0]]
        whole, _ = self._render(messages, prompt=False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:i], prompt=True)
            after, _ = self._render(messages[: i + 1], prompt=False)
            if not after.startswith(before) or not whole.startswith(after):
                raise ValueError(
                    "which words are the assistant's is not certain: the template neither marks them ({% generation %}) nor "
                    "only adds at the end. Give a template that marks them: data.chat_template=FILE"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def prompt(self, messages: Messages) -> str:
        """The chat up to where the assistant answers. Raises ValueError."""
        return self._render(messages, prompt=True)[0]

    def _render(self, messages: Messages, *, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # sandboxed: a template is foreign text
        try:
            texts, marks = render(
                conversations=[messages], chat_template=self.source, return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt, **self.words,
            )  # fmt: skip
        except Exception as error:  # a template refuses what it does not know: an order of roles, say
            raise ValueError(f"the chat template refuses it: {error}") from None
        return texts[0], [(start, end) for start, end in marks[0]] if marks else []


class _Writer:
    """Appends documents to a stream."""

    def __init__(self, stem: Path) -> None:
        self.documents = self.tokens = self.targets = 0
        self._files = [Path(f"{stem}-{part}.bin").open("wb") for part in ("ids", "carry", "ends")]  # noqa: SIM115

    def add(self, ids: np.ndarray, carry: np.ndarray) -> None:
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)
        self.targets += int(carry[1:].sum())
        for file, values in zip(self._files, (ids, carry, np.array([self.tokens], np.int64))):
            file.write(values.tobytes())

    def close(self) -> None:
        for file in self._files:
            file.close()


# ---- Chats of the standard library -----------------------------------------------------------------------------------


def _records(source: Source, cfg: Config, bad: Any) -> Iterator[Record]:
    """Rows of the source; of `stdlib`, a chat per documented function: its source, and what it does in one docstring."""
    if source.path != documents.STDLIB:
        yield from documents.records(source, cfg.data, bad)
        return
    for record in documents.records(source, cfg.data, bad):
        try:
            tree = ast.parse(str(record.value))
        except (SyntaxError, ValueError):
            continue  # a template or a file for an older Python: no function can be taken from it
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
                bare = ast.unparse(ast.fix_missing_locations(_without_docstring(node)))
                chat = [{"role": "user", "content": f"Write the docstring of this function.\n\n{bare}"},
                        {"role": "assistant", "content": docstring}]  # fmt: skip
                yield Record({"messages": chat}, record.file, node.lineno)


def _without_docstring(node: Any) -> Any:
    node.body = node.body[1:] or [ast.Pass()]
    return node
