"""Views of a picture: what training sees of it, and the tiles by which evaluation sees all of it.

Owns: the two datasets over anything that loads pictures (`Crops` for training, `Tiles` for evaluation), augmentation as
a pure function of (seed, epoch, index), resampling, and the colours in which classes are drawn.

Does not own: files, formats and which picture is held out (`train/data/images.py`, `train/data/digits.py`). NumPy only.

A picture is an array [height, width, channels] of uint8, uint16 or float32 in [0, 1]; a mask is an integer array
[height, width] of class ids. Samples hold `image`, float32 [channels, size, size], normalised, and `label` (int64) or
`mask` (int64 [size, size]); where a view reaches over the edge the image repeats its last row and the mask carries no
loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

AUGMENTATIONS = ("flip", "crop", "scale", "color", "shift")

_SCALE = 1.25
_SHIFT = 1 / 8
_COLOR = 0.25
_DRAWS = 11


class Pictures(Protocol):
    """Pictures with a class each, or a mask each, or neither."""

    names: list[str]
    sizes: np.ndarray
    """int64 [n, 2]: height and width as `load` gives them."""
    full_sizes: np.ndarray
    """The same of the pictures as they were found."""
    masked: bool
    """Whether every picture comes with a mask."""

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | int | None]:
        """Picture [H, W, C], and its mask [H, W], its class, or None. The caller does not write into them."""
        ...


@dataclass(frozen=True)
class Frame:
    """How a square becomes a sample."""

    size: int
    mean: Sequence[float]
    """Per channel, of pixels in [0, 1]: subtracted."""
    std: Sequence[float]
    """Divided by."""
    ignore_index: int

    def sample(self, image: np.ndarray, target: np.ndarray | int | None) -> dict[str, np.ndarray]:
        """Of an image [C, size, size] in [0, 1] and its mask, class or neither."""
        mean, std = (np.asarray(value, np.float32)[:, None, None] for value in (self.mean, self.std))
        sample = {"image": np.ascontiguousarray((image - mean) / std, np.float32)}
        if target is not None:
            sample["mask" if isinstance(target, np.ndarray) else "label"] = np.asarray(target, np.int64)
        return sample


class Crops:
    """Training samples: from each picture one square, augmented."""

    def __init__(self, pictures: Pictures, frame: Frame, augment: Sequence[str], fingerprint: str) -> None:
        self.pictures, self.frame, self.augment, self.fingerprint = pictures, frame, tuple(augment), fingerprint
        self.ignore = {"mask": frame.ignore_index} if pictures.masked else {}

    def __len__(self) -> int:
        return len(self.pictures.sizes)

    def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        picture, target = self.pictures.load(index)
        mask = target if isinstance(target, np.ndarray) else None
        image, mask = training_view(picture, mask, self.frame, self.augment, key=(seed, epoch, index))
        return self.frame.sample(image, target if mask is None else mask)


class Tiles:
    """Evaluation samples: every picture whole, as squares, each pixel of a mask in one of them.

    Samples also hold `picture` (int64), the picture that the tile is a part of.
    """

    def __init__(self, pictures: Pictures, frame: Frame, halo: int, fingerprint: str) -> None:
        """Neighbours overlap by two halos, in pixels."""
        self.pictures, self.frame, self.halo, self.fingerprint = pictures, frame, halo, fingerprint
        self.ignore = {"mask": frame.ignore_index} if pictures.masked else {}
        counts = _num_spans(pictures.sizes, frame.size, halo)
        self._columns = counts[:, 1]
        self._ends = np.concatenate([[0], np.cumsum(counts.prod(axis=1))])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def first(self, num_pictures: int) -> int:
        """Number of tiles of the first `num_pictures` pictures; they are the first tiles."""
        return int(self._ends[num_pictures])

    def place(self, index: int) -> tuple[int, slice, slice, slice, slice]:
        """Tile `index`: its picture; the rows and columns of the picture it answers for; the same inside the tile."""
        picture = int(np.searchsorted(self._ends, index, side="right")) - 1
        row, column = divmod(index - self.first(picture), int(self._columns[picture]))
        height, width = self.pictures.sizes[picture].tolist()
        top, rows = spans(height, self.frame.size, self.halo)[row]
        left, columns = spans(width, self.frame.size, self.halo)[column]
        inside = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        return picture, rows, columns, *inside

    def get(self, index: int, epoch: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
        picture, rows, columns, inside_rows, inside_columns = self.place(index)
        pixels, target = self.pictures.load(picture)
        size = self.frame.size
        y = np.clip(np.arange(size) + rows.start - inside_rows.start, 0, pixels.shape[0] - 1)
        x = np.clip(np.arange(size) + columns.start - inside_columns.start, 0, pixels.shape[1] - 1)
        if isinstance(target, np.ndarray):
            mask = np.full((size, size), self.frame.ignore_index, np.int64)
            mask[inside_rows, inside_columns] = target[rows, columns]
            target = mask
        image = unit(pixels[y[:, None], x[None, :]]).transpose(2, 0, 1)
        return {**self.frame.sample(image, target), "picture": np.asarray(picture, np.int64)}


def training_view(
    picture: np.ndarray, mask: np.ndarray | None, frame: Frame, augment: Sequence[str], *, key: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """A square out of `picture`: float32 [C, size, size] in [0, 1], and the same of its mask, int64 [size, size].

    Without augmentation it is the centre. `crop` moves it anywhere inside, `shift` by up to an eighth of its side,
    `scale` zooms by up to 1.25, `flip` mirrors left and right, `color` changes brightness, contrast and the balance of
    channels. The mask follows (nearest pixel). Every draw is made whatever is asked for, so that asking for one more
    changes none of the others.
    """
    size, draw = frame.size, iter(uniforms(key, _DRAWS))
    zoom, flip = _SCALE ** (2 * next(draw) - 1), next(draw) < 0.5
    side = size / zoom if "scale" in augment else float(size)
    axes = []
    for length in picture.shape[:2]:
        position, move = next(draw), 2 * next(draw) - 1
        slack = length - side
        start = position * slack if "crop" in augment and slack > 0 else slack / 2
        start = np.floor(start + 0.5 + (move * side * _SHIFT if "shift" in augment else 0))
        axes.append(start + (np.arange(size) + 0.5) * (side / size) - 0.5)
    y, x = axes
    if "flip" in augment and flip:
        x = x[::-1]
    image = resample(picture, y, x)
    if "color" in augment:
        image = _recolour(image, list(draw))
    if mask is None:
        return image, None
    rows, columns = np.floor(y + 0.5).astype(np.int64), np.floor(x + 0.5).astype(np.int64)
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))[None, :]
    nearest = mask[np.clip(rows, 0, mask.shape[0] - 1)[:, None], np.clip(columns, 0, mask.shape[1] - 1)[None, :]]
    return image, np.where(inside, nearest, frame.ignore_index).astype(np.int64)


def uniforms(key: tuple[int, int, int], count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, a function of three integers; of raw bits, which NumPy never moves."""
    first, second, third = (value & 0xFFFFFFFFFFFFFFFF for value in key)
    raw = np.random.Philox(key=first | second << 64, counter=third << 64).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def resample(picture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear samples of `picture` at rows `y` and columns `x`, pixel centres at integers: float32 [C, y, x]."""
    low, fraction = _bracket(y, picture.shape[0])
    rows = unit(picture[low[0]])
    if fraction.any():
        rows = rows + (unit(picture[low[1]]) - rows) * fraction[:, None, None]
    low, fraction = _bracket(x, picture.shape[1])
    image = rows[:, low[0]]
    if fraction.any():
        image = image + (rows[:, low[1]] - image) * fraction[None, :, None]
    return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)


def unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any stored type as float32 in [0, 1]."""
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32, copy=False)
    return pixels.astype(np.float32) * np.float32(1 / np.iinfo(pixels.dtype).max)


def spans(length: int, size: int, halo: int) -> list[tuple[int, slice]]:
    """How windows of `size` cover `length` pixels: the start of each, and the pixels it answers for.

    The windows lie evenly, none reaches over an edge unless `length < size` (then the one window is centred on it, and
    starts at 0 or below), neighbours overlap by at least two halos, and the slices tile `length`.
    """
    count = int(_num_spans(np.asarray(length), size, halo))
    if count == 1:
        return [((length - size) // 2, slice(0, length))]
    starts = [index * (length - size) // (count - 1) for index in range(count)]
    cuts = [0, *((a + size + b) // 2 for a, b in pairwise(starts)), length]
    return [(start, slice(cuts[index], cuts[index + 1])) for index, start in enumerate(starts)]


def palette(num_classes: int) -> np.ndarray:
    """A colour per class, uint8 [num_classes, 3]: class 0 black, the others bright, hues a golden section apart."""
    hue = (np.arange(num_classes) * 0.618034) % 1
    ramp = np.clip(np.abs((hue[:, None] * 6 + [0, 4, 2]) % 6 - 3) - 1, 0, 1)
    colours = np.rint(255 * (0.1 + 0.9 * ramp)).astype(np.uint8)
    colours[:1] = 0
    return colours


def overlay(picture: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """`picture` [H, W, C] with the classes of `mask` [H, W] laid over in colour and outlined: uint8 [H, W, 3].

    Class 0 and values that are no class stay as they are.
    """
    grey = unit(picture)
    grey = np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey
    known = (mask > 0) & (mask < num_classes)
    colours = unit(palette(num_classes))[np.where(known, mask, 0)]
    edge = np.zeros(mask.shape, bool)
    down, across = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    for part, change in ((edge[1:], down), (edge[:-1], down), (edge[:, 1:], across), (edge[:, :-1], across)):
        part |= change
    share = np.where(edge, 1.0, 0.5)[..., None] * known[..., None]
    return np.rint((grey * (1 - share) + colours * share) * 255).astype(np.uint8)


def _recolour(image: np.ndarray, draws: list[float]) -> np.ndarray:
    brightness, contrast, *balance = (1 + _COLOR * (2 * draw - 1) for draw in draws)
    if image.shape[0] == 3:
        gains = np.sqrt(np.asarray(balance[:3], np.float32))[:, None, None]
        image = image * gains
    centre = image.mean(dtype=np.float32)
    return np.clip(((image - centre) * np.float32(contrast) + centre) * np.float32(brightness), 0, 1)


def _bracket(at: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The two neighbours [2, n] of each position inside `length`, and how far it lies towards the second."""
    at = np.clip(at, 0, length - 1)
    low = np.floor(at).astype(np.int64)
    return np.stack([low, np.minimum(low + 1, length - 1)]), (at - low).astype(np.float32)


def _num_spans(length: np.ndarray, size: int, halo: int) -> np.ndarray:
    return 1 + np.maximum(0, -(-(length - size) // max(1, size - 2 * halo)))
