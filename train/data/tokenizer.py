"""Between text and ids: every tokenizer ends up as a `tokenizer.json` that Hugging Face's libraries load.

Owns: bytes, byte-level BPE trained on the data, and tokenizers of others (a directory, a hub id, a GGUF file, a run of
ours); the directory that `AutoTokenizer.from_pretrained` opens, chat template included; encoding documents, and showing
people which tokens carry loss.

Does not own: what is encoded (`text.py`, `chat.py`). Code that comes with a tokenizer is never run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data import DataError, cache, hub

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from train.config import Config

END, PAD, TURN, END_OF_TURN = SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
"""Special tokens of our own tokenizers: between documents, padding, and around the turns of a chat (ChatML)."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""ChatML, for tokenizers that bring none; `generation` marks what the assistant says, and so what carries loss."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SOURCES = (*_FILES, "config.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model")
"""What a tokenizer may be read from: the files that are there say which tokenizer it is."""
_PIECE = 1 << 20  # characters encoded at once; a longer document is cut at a line break, so that memory stays bounded
_TRAINING = 256 << 20  # bytes of text that a BPE is trained on: more changes few merges and takes minutes


@dataclass(frozen=True)
class Origin:
    """Where a tokenizer comes from, known without making it."""

    identity: str
    """sha256 of everything that determines the tokenizer besides the text that a BPE is trained on."""
    word: str
    """`bytes`, `bpe`, or what it was found under."""
    directory: Path | None = None
    """Files of a tokenizer on this machine."""
    commit: str | None = None
    """Of a hub id."""
    gguf_file: str | None = None
    """The model file that holds it."""


def locate(cfg: Config, say: Callable[[str], None]) -> Origin:
    """Which tokenizer `data.tokenizer` (and `model.path`) mean. Raises DataError when it is not there."""
    word, revision, gguf = cfg.data.tokenizer, None, None
    if word == "bpe" and cfg.model.path is not None:
        word, revision, gguf = cfg.model.path, cfg.model.revision, cfg.model.gguf_file
    template = _template(cfg)
    if word in ("bytes", "bpe"):
        size = cfg.data.tokenizer_vocab_size if word == "bpe" else 256 + len(SPECIALS)
        return Origin(cache.fingerprint(word, size, SPECIALS, template), word)
    root, where = cache.cache_root(cfg), Path(word).expanduser()
    if where.is_dir():
        directory = where / "tokenizer" if (where / "checkpoints").is_dir() else where
        names = [gguf] if gguf else [name for name in _SOURCES if (directory / name).is_file()]
        if not {*names} - {"config.json"}:
            raise DataError(f"{directory} holds no tokenizer: it has none of {', '.join(_SOURCES)}.")
        files = cache.identify(root, directory, [(name, directory / name) for name in names])
        return Origin(cache.fingerprint("files", files, template), word, directory, gguf_file=gguf)
    named = hub.parse(word)
    if named is None or where.exists():
        raise DataError(f"data.tokenizer={word}: give bytes, bpe, a tokenizer's directory, or a hub id.")
    commit = hub.commit("model", named[0], named[1] or revision, root, say)
    return Origin(cache.fingerprint("hub", named[0], commit, gguf, template), named[0], commit=commit, gguf_file=gguf)


def make(origin: Origin, directory: Path, texts: Callable[[], Iterator[str]], size: int, cfg: Config) -> Tokenizer:
    """Write the tokenizer into `directory` and open it. Raises DataError.

    `texts()` yields the training documents, `size` bytes in all (about; 0 is unknown); it is called for a BPE only.
    """
    if origin.word in ("bytes", "bpe"):
        backend = _train(texts, size, cfg.data.tokenizer_vocab_size) if origin.word == "bpe" else _bytes()
        backend.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    else:
        _copy(origin, directory, cache.cache_root(cfg))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    template = _template(cfg)
    if template is not None and settings.pop("chat_template", None) is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    if template is not None or not ("chat_template" in settings or (directory / "chat_template.jinja").exists()):
        (directory / "chat_template.jinja").write_text(template or CHAT_TEMPLATE)
    return Tokenizer(directory)


def save(tokenizer_directory: Path, to: Path) -> None:
    """Copy a tokenizer to where it is needed next: beside a run's weights, into an export."""
    to.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (tokenizer_directory / name).exists():
            shutil.copyfile(tokenizer_directory / name, to / name)


class Tokenizer:
    """A tokenizer that `make` wrote."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer as Backend

        text = (directory / "tokenizer.json").read_text()
        self.backend = Backend.from_str(text)
        """The tokenizer of the library `tokenizers`. Text that spells a special token is still text to `encode`."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        """One more than the largest id."""
        named = special_tokens(directory)
        self.eos = vocabulary.get(named.get("eos_token", ""))
        """Id that ends a text, if there is one."""
        separator = vocabulary.get(named.get("bos_token", ""), self.eos)
        if separator is None:
            raise DataError(
                f"{directory}: this tokenizer has neither a bos_token nor an eos_token to part documents with."
            )
        self.separator: int = separator
        """Id before each document: the beginning of a text, or its end where there is no word for the beginning."""
        self.content = cache.digest(text)
        """sha256 of tokenizer.json."""
        model = json.loads(text)["model"]
        self._table: np.ndarray | None = None
        if model["type"] == "BPE" and not model["merges"] and len(model["vocab"]) == 256:
            self._table = np.array([vocabulary[letter] for letter in _letters()], np.uint32)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32, nothing added before or after."""
        if self._table is not None:
            return [self._table[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        pieces = [list(_pieces(text)) for text in texts]
        encoded = iter(
            self.backend.encode_batch_fast([piece for text in pieces for piece in text], add_special_tokens=False)
        )
        return [np.concatenate([np.array(next(encoded).ids, np.uint32) for _ in text]) for text in pieces]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens spelled out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def marked(self, input_ids: np.ndarray, labels: np.ndarray) -> str:
        """A row as people read it: what carries loss stands between « and ».

        `labels[t]` is what position t predicts, so it is the token at t + 1 that carries the loss.
        """
        tokens = np.append(input_ids, labels[-1] if labels[-1] >= 0 else input_ids[:0])
        carries = [False, *(label >= 0 for label in labels)][: len(tokens)]
        runs = [
            (on, [token for token, _ in run]) for on, run in groupby(zip(tokens, carries), key=lambda pair: pair[1])
        ]
        return "".join(f"«{self.decode(run)}»" if on else self.decode(run) for on, run in runs)


def _train(texts: Callable[[], Iterator[str]], size: int, vocab_size: int) -> Backend:
    """Byte-level BPE with the pre-tokenisation of GPT-2: the same text gives the same tokenizer on any machine."""
    from tokenizers import models, trainers

    if vocab_size < 256 + len(SPECIALS):
        raise DataError(
            f"data.tokenizer_vocab_size={vocab_size}: at least {256 + len(SPECIALS)}, for 256 bytes and the special "
            f"tokens {' '.join(SPECIALS)}."
        )
    backend = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=_letters(), show_progress=False
    )
    backend.train_from_iterator(_sample(texts(), size), trainer)
    return backend


def _sample(texts: Iterator[str], size: int) -> Iterator[str]:
    """Of a large corpus, the documents whose hash falls into a share of it; of one of unknown size, the first."""
    part, left = _TRAINING / max(size, 1), 2 * _TRAINING
    for text in texts:
        if part >= 1 or cache.share(text) < part:
            yield text
            left -= len(text)
        if left < 0:
            return


def _bytes() -> Backend:
    """A token per byte, its id the byte; the special tokens come after."""
    from tokenizers import AddedToken, models

    backend = _byte_level(models.BPE({letter: i for i, letter in enumerate(_letters())}, []), use_regex=False)
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    return backend


def _byte_level(model: Any, use_regex: bool) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def _letters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself if it prints, else one above 255."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return [chr(byte if byte in prints else 256 + others.index(byte)) for byte in range(256)]


def _copy(origin: Origin, directory: Path, root: Path) -> None:
    """Bring a tokenizer of others into `directory`: its files as they are, or what `transformers` makes of them."""
    where = origin.directory
    if where is None:
        from huggingface_hub import snapshot_download

        wanted = [origin.gguf_file] if origin.gguf_file else list(_SOURCES)
        try:
            where = Path(snapshot_download(origin.word, revision=origin.commit, allow_patterns=wanted))
        except Exception as error:
            raise hub.explain(error, "model", origin.word, origin.commit) from None
    if origin.gguf_file or not all((where / name).is_file() for name in _FILES[:2]):
        converted = root / "tokenizers" / origin.identity[:32]  # kept, as reading a GGUF file takes many seconds
        if not converted.is_dir():
            cache.publish(converted, partial(_convert, origin, where))
        where = converted
    save(where, directory)


def _convert(origin: Origin, where: Path, to: Path) -> None:
    """Write the fast form of a tokenizer that has another."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(where, gguf_file=origin.gguf_file, trust_remote_code=False)
        loaded.save_pretrained(to)
    except Exception as error:
        raise hub.explain(error, "model", origin.word, origin.commit) from error
    if not (to / "tokenizer.json").is_file():
        raise DataError(f"{origin.word}: its tokenizer has no fast form (tokenizer.json), which is needed here.")


def _template(cfg: Config) -> str | None:
    """The chat template that the user gives as a file."""
    if cfg.data.chat_template is None:
        return None
    try:
        return Path(cfg.data.chat_template).expanduser().read_text()
    except (OSError, ValueError) as error:
        raise DataError(f"data.chat_template={cfg.data.chat_template} cannot be read: {error}.") from None


def special_tokens(directory: Path) -> dict[str, str]:
    """Name of each special token (`bos_token`, ...) -> its spelling."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            for key, value in json.loads((directory / name).read_text()).items():
                spelling = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(spelling, str):
                    found[key] = spelling
    return found


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of bounded size, each but the last ending with a line."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]
