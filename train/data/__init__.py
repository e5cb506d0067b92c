"""From what the user has to samples: the kinds of data, and the two calls through which everything else uses them.

Owns: `prepare` (once per content; fetch, read, fingerprint, publish into the cache), `open_datasets` (what `prepare`
left, as map-style datasets) and `show` (samples as the model will see them), each handed to the module of
`cfg.data.kind`.

Does not own: the order of samples (`train/order.py`), batches (`train/data/loader.py`), the cache's files
(`train/data/cache.py`). Imports nothing heavy: preparing, or finding that everything is prepared, never loads torch.

A kind is a module with three functions:

    prepare(cfg, say) -> Prepared
    open(prepared, cfg) -> (train datasets, one per source; validation dataset)
    show(prepared, cfg) -> list[str]                    three samples as the model will see them

and a dataset is anything of the form of `Dataset` below. A plug-in adds a kind: `KINDS["mine"] = "my_package.mine"`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from train.config import Config

KINDS: dict[str, str] = {
    "text": "train.data.text",
    "chat": "train.data.chat",
    "images": "train.data.images",
    "digits": "train.data.digits",
    "digit_scenes": "train.data.digits",
}
"""Kind of data -> the module that reads it, imported when it is first asked for."""


class DataError(Exception):
    """Something about the data that the user can put right; the message says what was given and what to do."""


class Dataset(Protocol):
    """Map-style samples of fixed shape. The same arguments give the same arrays, in any process and in any order."""

    fingerprint: str
    """Of the content the samples come from."""
    ignore: dict[str, int]
    """Key of a label array -> the value that carries no loss, e.g. `{"labels": -100}`; padding rows are full of it."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Sample `index`; augmentation, if any, is a function of (seed, epoch, index)."""
        ...


@dataclass(frozen=True)
class Prepared:
    """What `prepare` leaves: plain values only, so that it prints, travels and compares."""

    kind: str
    """The kind that made it and can open it."""
    directory: Path
    """The published directory in the cache. Where data lies is in no fingerprint."""
    fingerprints: dict[str, str]
    """Name ("data", "tokenizer", ...) -> sha256 of content; they enter the math hash."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the kind counted. Always: `train_samples` (list, one per source), `val_samples`, `bad_rows`."""


def prepare(cfg: Config, say: Callable[[str], None] = print) -> Prepared:
    """Make the data of `cfg` ready, or find that it is. Safe to call from several processes at once.

    `say` gets a line per thing worth knowing. Raises DataError.
    """
    weights = None if cfg.model.path is None else _weights(cfg, say)  # first: what is missing costs no tokenising
    prepared: Prepared = _module(cfg.data.kind).prepare(cfg, say)
    if weights is not None:
        prepared.fingerprints["model"] = weights
    return prepared


def open_datasets(prepared: Prepared, cfg: Config) -> tuple[list[Dataset], Dataset]:
    """The training datasets, one per source in the order of `weights(cfg)`, and the validation dataset."""
    return _module(prepared.kind).open(prepared, cfg)


def show(prepared: Prepared, cfg: Config) -> list[str]:
    """Three training samples as the model will see them, each a few lines of text."""
    return _module(prepared.kind).show(prepared, cfg)


def weights(cfg: Config) -> list[float]:
    """Relative weight of each training source, for `order.Order`."""
    return [source.weight for source in cfg.data.sources] or [1.0]


def total_steps(cfg: Config, samples: Sequence[int]) -> int:
    """The one duration that is set, in steps. samples: of each training source; an epoch is a pass over the first of them."""
    t = cfg.train
    if t.max_steps is not None:
        return t.max_steps
    if t.max_tokens is not None:
        return math.ceil(t.max_tokens / (t.global_batch_size * cfg.data.seq_len))
    assert t.max_epochs is not None  # config.validate: exactly one duration
    share = weights(cfg)
    return math.ceil(t.max_epochs * (samples[0] / share[0] * sum(share)) / t.global_batch_size)


def _weights(cfg: Config, say: Callable[[str], None]) -> str:
    """The content of `model.path`: of its files, of a run's checkpoint, or the commit of a hub id."""
    from train.data import cache, hub

    assert cfg.model.path is not None
    root, where = cache.cache_root(cfg), Path(cfg.model.path).expanduser()
    if not where.is_dir():
        named = hub.parse(cfg.model.path)
        if named is None:
            raise DataError(f"model.path={cfg.model.path}: there is no such directory.")
        commit = hub.commit("model", named[0], named[1] or cfg.model.revision, root, say)
        return cache.fingerprint("hub", named[0], commit, cfg.model.gguf_file)
    manifests = sorted(where.glob("checkpoints/step-*/manifest.json"))
    if manifests:  # a manifest hashes every file beside it
        best = json.loads(manifests[-1].read_text())["counters"].get("best_step") or 0
        chosen = where / f"checkpoints/step-{best:08d}/manifest.json"
        files = [chosen if chosen.is_file() else manifests[-1]]
    elif cfg.model.gguf_file:
        files = [where / cfg.model.gguf_file]
    else:
        files = sorted([*where.glob("*.safetensors"), *where.glob("config.json")])
    return cache.fingerprint(cache.identify(root, where, [(file.name, file) for file in files]))


def _module(kind: str) -> Any:
    if kind not in KINDS:
        raise DataError(f"data.kind={kind}: unknown kind of data. Known: {', '.join(KINDS)}.")
    return import_module(KINDS[kind])
