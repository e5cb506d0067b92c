"""Files into arrays: a picture or a mask of any mode, and what one look at a file finds out.

Owns: reading (`read_picture`, `read_mask`), `look` (a file's size, channels, statistics and values, or why it cannot be
used), and `Files`, pictures of a folder that are read when they are asked for and kept while there is room.

Does not own: which files belong together and what their values mean (`train/data/images.py`), samples (`views.py`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from train.data import DataError
from train.data.views import unit

MEMORY_BYTES = 512 * 1024**2
"""Decoded pictures that are kept in memory, per `Files`."""

_STATISTICS = 2**20  # pixels of a picture that are enough for its mean and deviation
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_GREY = ("1", "L", "LA", "La", *_DEEP)

Entry = tuple[str, str | None, str | None]
"""A picture's name, its mask's name, its class."""


@dataclass(frozen=True)
class Row:
    """A picture that can be used; names are relative to the folder that the user named."""

    name: str
    mask: str | None
    label: str | None
    height: int
    width: int
    channels: int
    mean: list[float]
    """Per channel, of pixels in [0, 1]."""
    square: list[float]
    """Mean of squares."""
    values: dict[str, int]
    """Value of the mask -> number of pixels."""


def look(root: Path, entries: Sequence[Entry]) -> Iterator[Row | str]:
    """Read every picture and mask once, several at a time: in order, what was found, or why it is of no use."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
        yield from pool.map(lambda entry: _look(root, *entry), entries)


def _look(root: Path, name: str, mask: str | None, label: str | None) -> Row | str:
    values: dict[str, int] = {}
    which = ""
    try:
        pixels = read_picture(root / name)
        if mask is not None:
            which = f"its mask {mask}: "
            ids = read_mask(root / mask)
            if ids.shape != pixels.shape[:2]:
                return f"{_size(pixels)} pixels, and its mask {mask} has {_size(ids)}"
            values = {str(value): int(count) for value, count in zip(*np.unique(ids, return_counts=True), strict=True)}
    except Exception as error:  # decoders of damaged files raise anything, and one of them must not end the rest
        return which + (str(error).replace(str(root), "").strip(" .") or type(error).__name__)
    height, width, channels = pixels.shape
    stride = max(1, round((height * width / _STATISTICS) ** 0.5))
    levels = unit(pixels[::stride, ::stride])
    mean, square = (part.mean(axis=(0, 1), dtype=np.float64).round(6).tolist() for part in (levels, levels * levels))
    return Row(name, mask, label, height, width, channels, mean, square, values)


def _bytes(found: tuple[Any, ...]) -> int:
    return sum(part.nbytes for part in found if isinstance(part, np.ndarray))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


class Files:
    """Pictures read from files; those used last are kept in memory. Safe to use from several threads."""

    def __init__(
        self,
        rows: Sequence[tuple[Path, Row]],
        labels: Mapping[str, int],
        *,
        channels: int,
        side: int | None,
        foreground: int | None,
    ) -> None:
        """`labels` numbers the classes; `side` resizes to a square; `foreground` is the value of masks that is class 1
        where all others are class 0, and None where the values are the classes."""
        self.rows, self.labels, self.channels, self.side, self.foreground = rows, labels, channels, side, foreground
        self.names = [row.name for _, row in rows]
        self.masked = bool(rows) and rows[0][1].mask is not None
        self.full_sizes = np.asarray([(row.height, row.width) for _, row in rows], np.int64).reshape(-1, 2)
        self.sizes = np.full_like(self.full_sizes, side) if side else self.full_sizes
        self._kept: OrderedDict[int, tuple[np.ndarray, Any]] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def load(self, index: int) -> tuple[np.ndarray, Any]:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        found = self._read(*self.rows[index])
        with self._lock:
            if index not in self._kept:
                self._kept[index] = found
                self._kept_bytes += _bytes(found)
            while self._kept_bytes > MEMORY_BYTES:
                self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])
        return found

    def _read(self, root: Path, row: Row) -> tuple[np.ndarray, Any]:
        try:
            picture = read_picture(root / row.name, channels=self.channels, side=self.side)
            if row.mask is None:
                return picture, None if row.label is None else self.labels[row.label]
            mask = read_mask(root / row.mask, side=self.side)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{root / row.name} could be read when it was prepared and cannot now: {error}.") from error
        return picture, mask if self.foreground is None else (mask == self.foreground).astype(np.uint8)


def read_picture(path: Path, *, channels: int | None = None, side: int | None = None) -> np.ndarray:
    """A picture of any mode, upright, [H, W, 1 or 3]: uint8; uint16 or float32 where the file is.

    Transparency is laid on white. `channels` repeats grey or drops colour; None leaves grey 1 and everything else 3.
    `side` resizes to a square. Raises OSError, SyntaxError or ValueError (with the reason) where it cannot be used.
    """
    with _opened(path) as opened:
        if side is not None:
            opened.draft(None, (2 * side, 2 * side))  # JPEG: decode at a fraction of the size
        grey = opened.mode in _GREY
        image = ImageOps.exif_transpose(opened)
        if image.mode in _DEEP:
            pixels = np.asarray(image)
            low, high = (0.0, 1.0) if image.mode == "F" else (0, 65535)
            if not (pixels.min() >= low and pixels.max() <= high):
                raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}, where {low} to {high} are needed")
            pixels = pixels.astype(np.float32 if image.mode == "F" else np.uint16)
            if side is not None:
                resized = Image.fromarray(unit(pixels)).resize((side, side), Image.Resampling.BILINEAR)
                pixels = np.asarray(resized)
        else:
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if grey or channels == 1 else "RGB")
            if side is not None:
                image = image.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
            pixels = np.asarray(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.repeat(pixels, 3, axis=2) if channels == 3 and pixels.shape[2] == 1 else pixels


def read_mask(path: Path, *, side: int | None = None) -> np.ndarray:
    """The ids of a mask, uint8 or int32 [H, W], upright. Raises as `read_picture`, and for colours."""
    with _opened(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if side is not None:
            image = image.resize((side, side), Image.Resampling.NEAREST)
        values = np.asarray(image)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", *_DEEP[:-1]):
            raise ValueError(f"a mask of mode {image.mode}; save it as grey or palette PNG that holds class ids")
    if values.ndim == 3:
        if image.mode.startswith("RGB") and (values[..., :3] != values[..., :1]).any():
            raise ValueError("a mask in colours, which say no class ids; save it as grey or palette PNG")
        values = values[..., 0]
    return values.astype(np.uint8 if values.dtype in (np.uint8, np.bool_) else np.int32)


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError("not a picture that can be read") from None
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
    return image
