"""Real pictures that come with a dependency: scikit-learn's 1,797 handwritten digits, alone or in scenes.

Owns: `digits` (8 x 8, grey, a class each) and `digit_scenes` (digits drawn on cluttered canvases in colour, a class for
each pixel), made once into the cache and the same on every machine.

Does not own: samples (`views.py`), what kinds of pictures share (`images.py`).

Digits are held out by the hash of their number, class by class; scenes of the validation data are made of held-out
digits only. A scene is a function of its number and of the digits it may use, and of no seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data import DataError, Prepared, cache
from train.data.images import checkpoint, crops, hold_out, normalisation, show_crops, tiles
from train.data.views import Crops, resample, uniforms, unit

if TYPE_CHECKING:
    from train.config import Config
    from train.data import Dataset

CANVAS = 64
"""Side of a scene in pixels."""
TRAIN_SCENES, VAL_SCENES = 2000, 200

_RECIPE = 1  # of what `_draw` makes; a new one makes the cache draw again
_CLUTTER, _MOST_DIGITS = 10, 8


def prepare(cfg: Config, say: Callable[[str], None]) -> Prepared:
    """Put the arrays of `cfg.data.kind` into the cache. Raises DataError where scikit-learn is missing."""
    data, kind = cfg.data, cfg.data.kind
    split = [data.folds, data.fold] if data.fold is not None else data.val_fraction
    directory = cache.cache_root(cfg) / "digits" / cache.fingerprint(_RECIPE, kind, split)[:32]
    if not (directory / "meta.json").exists():
        drawing = f", drawing {TRAIN_SCENES + VAL_SCENES:,} scenes" if kind == "digit_scenes" else ""
        say(f"Reading scikit-learn's digits{drawing}")
        cache.publish(directory, lambda new: _make(new, cfg))
    meta = json.loads((directory / "meta.json").read_text())
    channels = checkpoint(cfg).get("channels") or len(meta["mean"])
    if channels < len(meta["mean"]):
        raise DataError(f"model.path={cfg.model.path} sees grey pictures, and data.kind={kind} is in colour.")
    mean, std = normalisation(cfg, *(meta[name] * (channels // len(meta["mean"])) for name in ("mean", "square")))
    info: dict[str, Any] = {
        **{key: meta[key] for key in ("classes", "class_counts", "train_samples")},
        "num_classes": len(meta["classes"]),
        "channels": channels,
        "mean": mean,
        "std": std,
        "bad_rows": 0,
    }
    prepared = Prepared(kind, directory, {"data": meta["fingerprint"]}, info)
    info["val_samples"] = len(open(prepared, cfg)[1])
    return prepared


def open(prepared: Prepared, cfg: Config) -> tuple[list[Dataset], Dataset]:
    """Training squares and the tiles of the held-out pictures."""
    train, val = (Arrays(prepared.directory, split, prepared.info["channels"]) for split in ("train", "val"))
    content = prepared.fingerprints["data"]
    return [crops(train, cfg, prepared.info, content)], tiles(val, cfg, prepared.info, content)


def show(prepared: Prepared, cfg: Config) -> list[str]:
    """Three training samples, drawn as the model will see them into files beside the prepared data."""
    train_set = open(prepared, cfg)[0][0]
    assert isinstance(train_set, Crops)
    return show_crops(train_set, prepared, cfg)


class Arrays:
    """Pictures of one size in a memory-mapped array, with their labels or masks in another."""

    def __init__(self, directory: Path, split: str, channels: int) -> None:
        self.pictures, self.targets = (
            np.load(directory / f"{split}-{what}.npy", mmap_mode="r", allow_pickle=False)
            for what in ("pictures", "targets")
        )
        self.channels = channels
        self.names = [f"{split}-{index:04d}.png" for index in range(len(self.pictures))]
        self.sizes = self.full_sizes = np.tile(np.asarray(self.pictures.shape[1:3], np.int64), (len(self.pictures), 1))
        self.masked = self.targets.ndim == 3

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | int | None]:
        picture = self.pictures[index]
        if picture.shape[2] < self.channels:
            picture = np.repeat(picture, self.channels, axis=2)
        return picture, self.targets[index] if self.masked else int(self.targets[index])


def scene(number: int, digits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scene `number`: uint8 [64, 64, 3], and its mask, uint8 [64, 64]: 0 is the canvas, d + 1 the strokes of digit d.

    `digits` are uint8 [n, 8, 8]. Only sums, products and comparisons of exact numbers, so that every machine draws the
    same bytes.
    """
    draw = iter(uniforms((_RECIPE, len(digits), number), 4096))
    ramp = np.arange(CANVAS) / CANVAS
    canvas = np.empty((CANVAS, CANVAS, 3))
    for channel in range(3):  # a slope of dim light in any direction
        at, down, across = next(draw) * 0.4, next(draw) * 0.2 - 0.1, next(draw) * 0.2 - 0.1
        canvas[..., channel] = at + down * ramp[:, None] + across * ramp[None, :]
    for _ in range(_CLUTTER):  # bars as bright as digits, and boxes
        y, x = int(next(draw) * CANVAS), int(next(draw) * CANVAS)
        long, thick = 4 + int(next(draw) * 24), 1 + int(next(draw) * 4)
        height, width = (long, thick) if next(draw) < 0.5 else (thick, long)
        canvas[y : y + height, x : x + width] = [0.15 + 0.6 * next(draw) for _ in range(3)]
    mask = np.zeros((CANVAS, CANVAS), np.uint8)
    taken = np.zeros((CANVAS, CANVAS), bool)
    for _ in range(3 + int(next(draw) * (_MOST_DIGITS - 2))):
        which, side = int(next(draw) * len(digits)), 16 + int(next(draw) * 11)
        colour = np.asarray([0.5 + 0.5 * next(draw) for _ in range(3)])
        spots = [(int(next(draw) * (CANVAS - side)), int(next(draw) * (CANVAS - side))) for _ in range(12)]
        free = [(y, x) for y, x in spots if not taken[y : y + side, x : x + side].any()]
        if not free:
            continue
        y, x = free[0]
        at = (np.arange(side) + 0.5) * 8 / side - 0.5
        ink = resample(digits[which][:, :, None], at, at)[0]
        strokes = ink >= 0.5
        taken[y : y + side, x : x + side] = True
        mask[y : y + side, x : x + side][strokes] = labels[which] + 1
        canvas[y : y + side, x : x + side][strokes] = colour * ink[strokes][:, None]
    noise = uniforms((_RECIPE, len(digits) + 1, number), CANVAS * CANVAS * 3).reshape(canvas.shape) - 0.5
    return np.clip((canvas + 0.15 * noise) * 255, 0, 255).astype(np.uint8), mask


def _make(directory: Path, cfg: Config) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            f"data.kind={cfg.data.kind} reads the digits that come with scikit-learn, which is not installed. "
            "Install it: pip install 'gearshift[digits]'."
        ) from None
    found = load_digits()
    digits = (found.images.astype(np.int64) * 255 // 16).astype(np.uint8)
    labels = found.target.astype(np.int64)
    held = hold_out([f"digit-{number}" for number in range(len(digits))], labels.tolist(), cfg.data)
    arrays: dict[str, np.ndarray] = {}
    for split, chosen, scenes in (("train", ~held, TRAIN_SCENES), ("val", held, VAL_SCENES)):
        pictures, targets = digits[chosen][..., None], labels[chosen]
        if cfg.data.kind == "digit_scenes":
            drawn = [scene(number, digits[chosen], targets) for number in range(scenes)]
            pictures, targets = (np.stack(part) for part in zip(*drawn, strict=True))
        arrays |= {f"{split}-pictures": pictures, f"{split}-targets": targets}
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array, allow_pickle=False)
    levels, counts = unit(arrays["train-pictures"]), np.bincount(arrays["train-targets"].ravel())
    meta = {
        "classes": ["canvas", *map(str, range(10))] if cfg.data.kind == "digit_scenes" else [str(d) for d in range(10)],
        "class_counts": counts.tolist(),
        "train_samples": [len(levels)],
        "mean": levels.mean(axis=(0, 1, 2), dtype=np.float64).tolist(),
        "square": np.square(levels).mean(axis=(0, 1, 2), dtype=np.float64).tolist(),
        "fingerprint": cache.fingerprint(*(cache.digest(arrays[name].tobytes()) for name in sorted(arrays))),
    }
    (directory / "meta.json").write_text(json.dumps(meta))
