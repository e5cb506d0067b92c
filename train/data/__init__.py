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

from collections.abc import Callable
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
    "digits": "train.data.images",
    "digit_scenes": "train.data.images",
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

    `say` gets a line per thing worth knowing; nothing when everything was there. Raises DataError.
    """
    return _module(cfg.data.kind).prepare(cfg, say)


def open_datasets(prepared: Prepared, cfg: Config) -> tuple[list[Dataset], Dataset]:
    """The training datasets, one per source in the order of `weights(cfg)`, and the validation dataset."""
    return _module(prepared.kind).open(prepared, cfg)


def show(prepared: Prepared, cfg: Config) -> list[str]:
    """Three training samples as the model will see them, each a few lines of text."""
    return _module(prepared.kind).show(prepared, cfg)


def weights(cfg: Config) -> list[float]:
    """Relative weight of each training source, for `order.Order`."""
    return [source.weight for source in cfg.data.sources] or [1.0]


def _module(kind: str) -> Any:
    if kind not in KINDS:
        raise DataError(f"data.kind={kind}: unknown kind of data. Known: {', '.join(KINDS)}.")
    return import_module(KINDS[kind])
