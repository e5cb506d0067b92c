"""A class per picture.

Owns: the cross-entropy with label smoothing and class weights, accuracy and the confusion matrix over whole pictures,
the CSV of predictions.

Does not own: what it shares with the other task over pictures (`vision.py`), pictures, networks.

A picture that is larger than a tile is judged by the mean of its tiles' log-probabilities.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.data.views import Tiles
from train.tasks.vision import VisionTask, logits_of, looking, open_directory

if TYPE_CHECKING:
    from train.tasks.vision import Batch, Reduce


class Classify(VisionTask):
    """Samples carry `image` [B, C, S, S], `label` [B], and when evaluated `picture` [B]."""

    objective = "eval_accuracy"
    directions: ClassVar = {"eval_accuracy": True, "eval_loss": False}

    confusion: np.ndarray | None = None
    """int64 [classes, classes] of the last evaluation: true class by row, predicted class by column."""

    def count(self, batch: Batch) -> Tensor:
        return (batch["weight"] > 0).sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each picture's cross-entropy, times the weight of its class; with label smoothing e, (1 - e) of it is on the
        label and e spread over all classes."""
        log_probabilities = F.log_softmax(logits_of(model, batch["image"]), dim=1)
        labels = F.one_hot(batch["label"], self.num_classes).to(log_probabilities.dtype)
        smoothing = self.cfg.task.label_smoothing
        wanted = labels * (1 - smoothing) + smoothing / self.num_classes
        losses = -(wanted * log_probabilities).sum(dim=1)
        weights = self.class_weights(losses)
        if weights is not None:
            losses = losses * weights[batch["label"]]
        return (losses * batch["weight"]).sum(), self.count(batch)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce) -> dict[str, float]:
        """`eval_accuracy` over pictures, and `eval_loss`: their mean cross-entropy, neither smoothed nor weighted."""
        pictures = len(self.held_out.pictures.sizes)
        scores = torch.zeros(pictures, self.num_classes, dtype=torch.float64)
        seen = torch.zeros(pictures, 2, dtype=torch.int64)  # tiles; sum of their labels
        with looking(model):
            for batch in batches:
                log_probabilities = F.log_softmax(logits_of(model, batch["image"]), dim=1).cpu().double()
                rows = batch["weight"].cpu() > 0
                picture, label = batch["picture"].cpu()[rows], batch["label"].cpu()[rows]
                scores.index_add_(0, picture, log_probabilities[rows])
                seen.index_add_(0, picture, torch.stack([torch.ones_like(label), label], dim=1))
        scores, seen = reduce(scores), reduce(seen)
        judged = seen[:, 0] > 0
        return self._judge(scores[judged] / seen[judged, :1], seen[judged, 1] // seen[judged, 0])

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """For each row of weight 1 the probabilities of the classes, float32 [classes]."""
        with looking(model):
            probabilities = F.softmax(logits_of(model, batch["image"]), dim=1)
        return list(probabilities[batch["weight"] > 0].cpu().numpy())

    def predict_files(
        self, model: nn.Module, source: Path | None, directory: Path, say: Callable[[str], None] = print
    ) -> dict[str, float]:
        """Write `classes.csv` (file, class, true class, probability of each class) into `directory`, for the pictures
        of a file or folder, or the held-out ones. Returns metrics where there are class folders. Raises DataError."""
        tiles = self.sources(source, say)
        scores, labels = self._scores(model, tiles, len(tiles.pictures.names))
        self._write(open_directory(directory), tiles.pictures.names, scores, labels)
        return {} if labels is None else self._judge(scores, labels)

    def sample(self, model: nn.Module, step: int, directory: Path | None) -> None:
        """`classes.csv` of the first held-out pictures, and `confusion.csv` of the last evaluation."""
        names = self.held_out.pictures.names[: self.cfg.eval.samples]
        scores, labels = self._scores(model, self.held_out, len(names))
        if directory is not None:
            self._write(open_directory(directory), names, scores, labels)
            if self.confusion is not None:
                rows = [[name, *counts] for name, counts in zip(self.classes, self.confusion.tolist(), strict=True)]
                _write_csv(directory / "confusion.csv", [["true \\ predicted", *self.classes], *rows])

    def _scores(self, model: nn.Module, tiles: Tiles, count: int) -> tuple[Tensor, Tensor | None]:
        """Of the first `count` pictures: mean log-probabilities, float64 [count, classes], and labels if any."""
        scores = torch.zeros(count, self.num_classes, dtype=torch.float64)
        seen = torch.zeros(count, 1, dtype=torch.float64)
        labels = torch.full((count,), -1)
        for indices, batch in self.forwards(model, tiles, tiles.first(count)):
            with looking(model):
                found = F.log_softmax(logits_of(model, batch["image"]), dim=1)[: len(indices)].cpu().double()
            picture = batch["picture"][: len(indices)].cpu()
            scores.index_add_(0, picture, found)
            seen.index_add_(0, picture, torch.ones(len(indices), 1, dtype=torch.float64))
            if "label" in batch:
                labels[picture] = batch["label"][: len(indices)].cpu()
        return scores / seen, labels if (labels >= 0).all() else None

    def _judge(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Metrics from a score per class, [n, classes], and the true classes, int64 [n]."""
        predicted = scores.argmax(dim=1)
        cells = torch.bincount(labels * self.num_classes + predicted, minlength=self.num_classes**2)
        self.confusion = cells.view(self.num_classes, self.num_classes).numpy()
        loss = F.nll_loss(F.log_softmax(scores, dim=1), labels)
        return {"eval_loss": loss.item(), "eval_accuracy": (predicted == labels).double().mean().item()}

    def _write(self, directory: Path, names: Sequence[str], scores: Tensor, labels: Tensor | None) -> None:
        rows = []
        for index, (name, row) in enumerate(zip(names, F.softmax(scores, dim=1), strict=True)):
            true = "" if labels is None else self.classes[int(labels[index])]
            rows.append([name, self.classes[int(row.argmax())], true, *(f"{value:.6f}" for value in row.tolist())])
        _write_csv(directory / "classes.csv", [["file", "class", "true", *self.classes], *rows])


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
