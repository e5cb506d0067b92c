"""What the tasks over pictures share: the model, the weights of classes, looking at whole pictures by tiles.

Owns: `VisionTask`, the part of the task interface that `classify.py` and `segment.py` have in common.

Does not own: a loss, a metric, or what is written for people; each task has its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from train import data, models
from train.data import DataError
from train.data.images import inputs
from train.data.views import Tiles

if TYPE_CHECKING:
    from train.config import Config
    from train.data import Prepared

    Batch = dict[str, Tensor]
    Reduce = Callable[[Tensor], Tensor]

TILES_AT_ONCE = 16
"""Tiles in a forward of `sample` and `predict_files`, which do not know the micro-batch."""


class VisionTask:
    """Over pictures; `prepared.info` holds `num_classes`, `classes` (their names), `channels`, `class_counts`."""

    def __init__(self, cfg: Config, prepared: Prepared) -> None:
        self.cfg, self.prepared, self.info = cfg, prepared, prepared.info
        self.num_classes: int = self.info["num_classes"]
        self.classes: list[str] = self.info["classes"]
        self._weights = self._weigh_classes()
        self._placed: Tensor | None = None

    def build_model(self) -> nn.Module:
        """The network over normalised images. Raises models.ModelError."""
        return models.build(self.cfg, self.info)

    @functools.cached_property
    def held_out(self) -> Tiles:
        """The validation pictures."""
        return data.open_datasets(self.prepared, self.cfg)[1]  # type: ignore[return-value]

    def class_weights(self, like: Tensor) -> Tensor | None:
        """float32 [classes] beside `like`, their mean over the training data 1; None where all weigh the same."""
        if self._weights is None:
            return None
        if self._placed is not None and self._placed.device == like.device and type(self._placed) is type(like):
            return self._placed
        placed = torch.tensor(self._weights, dtype=torch.float32, device=like.device)
        if type(placed) is Tensor:  # not that of a trace, which lives in the trace
            self._placed = placed
        return placed

    def _weigh_classes(self) -> list[float] | None:
        asked = self.cfg.task.class_weights
        if asked is None:
            return None
        counts = np.asarray(self.info["class_counts"], np.float64)
        if asked == "balanced":
            weights = np.where(counts > 0, counts.sum() / np.maximum(counts, 1), 0.0)
        elif not isinstance(asked, str) and len(asked) == self.num_classes and min(asked) >= 0:
            weights = np.asarray(asked, np.float64)
        else:
            raise DataError(
                f"task.class_weights={asked}: this data has {self.num_classes} classes. "
                f"Give task.class_weights=balanced, or a list of {self.num_classes} numbers that are 0 or more."
            )
        mean = float((weights * counts).sum() / counts.sum())
        if mean == 0:
            raise DataError(f"task.class_weights={asked}: every class in the training data has weight 0.")
        return (weights / mean).tolist()

    def sources(self, source: Path | None, say: Callable[[str], None]) -> Tiles:
        """The pictures to predict: those of a file or folder, or the held-out ones. Raises DataError."""
        return self.held_out if source is None else inputs(source, self.cfg, self.info, say)

    def forwards(self, model: nn.Module, tiles: Tiles, count: int) -> Iterator[tuple[range, Batch]]:
        """The first `count` tiles as batches on the model's device, all of one size: the last repeats its last row."""
        device = next(model.parameters()).device
        size = min(TILES_AT_ONCE, count)
        for start in range(0, count, size or 1):
            indices = range(start, min(start + size, count))
            samples = [tiles.get(index) for index in indices]
            samples += [samples[-1]] * (size - len(samples))
            batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
            batch["weight"] = (torch.arange(size) < len(indices)).float()
            yield indices, {key: value.to(device) for key, value in batch.items()}


def logits_of(model: nn.Module, image: Tensor) -> Tensor:
    """float32 logits of our networks and of those of transformers."""
    out: Any = model(image)
    return (out if isinstance(out, Tensor) else out.logits).float()


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Inside: `model` in evaluation mode and no gradients; after it, the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def open_directory(directory: Path) -> Path:
    """Make `directory`; raises DataError where that cannot be done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Cannot write into {directory}: {error.strerror}. Give another directory.") from error
    return directory
