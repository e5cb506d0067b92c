"""A class per pixel.

Owns: the loss (cross-entropy and Dice of each sample), mIoU from the confusion matrix over all pixels, stitching tiles
into masks, the masks and overlays that are written.

Does not own: what it shares with the other task over pictures (`vision.py`), pictures, networks.

Pixels of `data.ignore_index` carry no loss and are in no metric. A picture is judged whole: it is cut into overlapping
tiles and each of its pixels is taken from one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from train.data.images import stem
from train.data.views import Tiles, overlay, palette
from train.tasks.vision import VisionTask, logits_of, looking, open_directory

if TYPE_CHECKING:
    from train.tasks.vision import Batch, Reduce

_SMALLEST_SIDE = 256  # samples are enlarged to this, for eyes


class Segment(VisionTask):
    """Samples carry `image` [B, C, S, S] and `mask` [B, S, S]."""

    objective = "eval_miou"
    directions: ClassVar = {"eval_miou": True, "eval_accuracy": True, "eval_loss": False}

    confusion: np.ndarray | None = None
    """int64 [classes, classes], pixels of the last evaluation: true class by row, predicted class by column."""

    def count(self, batch: Batch) -> Tensor:
        return self._carries(batch).sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each sample the mean cross-entropy of its pixels, each times the weight of its class, and
        `task.dice_weight` times (1 - the mean Dice of the classes that are in it)."""
        return self._loss(self._logits(model, batch), batch)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce) -> dict[str, float]:
        """`eval_miou`: intersection over union of all pixels together, mean over the classes that occur;
        `eval_accuracy`: the share of pixels that are right; `eval_loss`: the mean of `loss` over tiles."""
        cells = torch.zeros(self.num_classes**2, dtype=torch.int64)
        loss, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        with looking(model):
            for batch in batches:
                logits = self._logits(model, batch)
                found = self._loss(logits, batch)
                loss, count = loss + found[0].cpu(), count + found[1].cpu()
                cells += self._cells(logits.argmax(dim=1), batch).cpu()
        loss, count = reduce(loss), reduce(count)
        return {"eval_loss": loss.item() / max(count.item(), 1), **self._judge(reduce(cells))}

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """For each row of weight 1 the class of each pixel, int64 [S, S]."""
        with looking(model):
            classes = self._logits(model, batch).argmax(dim=1)
        return list(classes[batch["weight"] > 0].cpu().numpy())

    def predict_files(
        self, model: nn.Module, source: Path | None, directory: Path, say: Callable[[str], None] = print
    ) -> dict[str, float]:
        """Write `masks/NAME.png` (as large as the picture; the indices of its palette are the classes) and
        `overlays/NAME.png` into `directory`, for the pictures of a file or folder, or the held-out ones. Returns
        metrics where there are masks. Raises DataError."""
        tiles = self.sources(source, say)
        names = [stem(name) for name in tiles.pictures.names]
        if len(set(names)) < len(names):  # a.png beside a.jpg
            names = list(tiles.pictures.names)
        cells = torch.zeros(self.num_classes**2, dtype=torch.int64)
        for index, mask, counted in self._whole(model, tiles, len(names)):
            cells += counted
            ids = Image.fromarray(mask.astype(np.uint8 if self.num_classes <= 256 else np.uint16))
            height, width = tiles.pictures.full_sizes[index].tolist()
            ids = ids.resize((width, height), Image.Resampling.NEAREST)
            if self.num_classes <= 256:
                ids.putpalette(palette(256).tobytes())
            drawn = Image.fromarray(overlay(tiles.pictures.load(index)[0], mask, self.num_classes))
            for what, picture in (("masks", ids), ("overlays", drawn)):
                path = directory / what / f"{names[index]}.png"
                open_directory(path.parent)
                picture.save(path)
        return self._judge(cells) if tiles.pictures.masked else {}

    def sample(self, model: nn.Module, step: int, directory: Path | None) -> None:
        """The first held-out pictures as PNG: the picture, the true mask over it, the predicted mask over it."""
        pictures = self.held_out.pictures
        count = min(self.cfg.eval.samples, len(pictures.names))
        for index, mask, _ in self._whole(model, self.held_out, count):
            if directory is None:
                continue
            picture, truth = pictures.load(index)
            assert isinstance(truth, np.ndarray)
            layers = (np.zeros_like(mask), truth, mask)
            strip = np.concatenate([overlay(picture, layer, self.num_classes) for layer in layers], axis=1)
            zoom = max(1, _SMALLEST_SIDE // picture.shape[0])
            path = open_directory(directory) / f"{stem(pictures.names[index]).replace('/', '-')}.png"
            Image.fromarray(strip.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 [B, classes, S, S]; networks that answer at a lower resolution are interpolated."""
        logits, size = logits_of(model, batch["image"]), batch["image"].shape[-2:]
        return logits if logits.shape[-2:] == size else F.interpolate(logits, size=size, mode="bilinear")

    def _carries(self, batch: Batch) -> Tensor:
        return (batch["weight"] > 0) & (batch["mask"] != self.cfg.data.ignore_index).flatten(1).any(dim=1)

    def _loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        mask, carries = batch["mask"], self._carries(batch)
        classes = torch.arange(self.num_classes, device=mask.device)[None, :, None, None]
        # One-hot products and no gather, whose backward pass adds in no fixed order on a GPU; 0 where ignored.
        truth = (mask[:, None] == classes).to(logits.dtype) * (mask != self.cfg.data.ignore_index)[:, None]
        log_probabilities = F.log_softmax(logits, dim=1)
        weights = self.class_weights(logits)
        wanted = truth if weights is None else truth * weights[None, :, None, None]
        pixels = truth.sum(dim=(1, 2, 3))
        losses = -(wanted * log_probabilities).sum(dim=(1, 2, 3)) / pixels.clamp(min=1)
        if self.cfg.task.dice_weight:
            predicted = log_probabilities.exp() * truth.sum(dim=1, keepdim=True)
            area = truth.sum(dim=(2, 3))
            dice = 2 * (predicted * truth).sum(dim=(2, 3)) / (predicted.sum(dim=(2, 3)) + area).clamp(min=1)
            present = (area > 0).to(dice.dtype)
            losses = losses + self.cfg.task.dice_weight * (
                1 - (dice * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
            )
        return (losses * carries).sum(), carries.sum()

    def _cells(self, predicted: Tensor, batch: Batch) -> Tensor:
        """Pixels by (true class, predicted class), int64 [classes * classes], without padding and ignored pixels."""
        truth = batch["mask"]
        counts = (truth != self.cfg.data.ignore_index) & (batch["weight"] > 0)[:, None, None]
        return torch.bincount(truth[counts] * self.num_classes + predicted[counts], minlength=self.num_classes**2)

    def _judge(self, cells: Tensor) -> dict[str, float]:
        self.confusion = cells.view(self.num_classes, self.num_classes).numpy()
        right = self.confusion.diagonal().astype(np.float64)
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - right
        occurs = union > 0
        return {
            "eval_miou": float((right[occurs] / union[occurs]).mean()) if occurs.any() else 0.0,
            "eval_accuracy": float(right.sum() / max(self.confusion.sum(), 1)),
        }

    def _whole(self, model: nn.Module, tiles: Tiles, count: int) -> Iterable[tuple[int, np.ndarray, Tensor]]:
        """Of the first `count` pictures: number, mask (int64 [H, W]) stitched from tiles, and its `_cells` if it has a
        true mask. One picture is in memory at a time."""
        mask, cells = np.zeros((0, 0), np.int64), torch.zeros(self.num_classes**2, dtype=torch.int64)
        for indices, batch in self.forwards(model, tiles, tiles.first(count)):
            for row, (index, classes) in enumerate(zip(indices, self.predict(model, batch), strict=True)):
                picture, *places = tiles.place(index)
                if index == tiles.first(picture):
                    mask, cells = np.zeros(tiles.pictures.sizes[picture], np.int64), torch.zeros_like(cells)
                mask[places[0], places[1]] = classes[places[2], places[3]]
                if "mask" in batch:
                    one = {key: batch[key][row : row + 1].cpu() for key in ("mask", "weight")}
                    cells = cells + self._cells(torch.from_numpy(classes)[None], one)
                if index == tiles.first(picture + 1) - 1:
                    yield picture, mask, cells
