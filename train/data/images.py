"""Pictures of the user's own: a folder per class, or pictures and masks paired by stem.

Owns: which files belong together, examining each once, which pictures are held out, the number of classes and what the
values of masks mean, and what the kinds of pictures share (`crops`, `tiles`, `normalisation`, `hold_out`,
`show_crops`).

Does not own: decoding (`train/data/pictures.py`), what a sample is cut out of a picture (`train/data/views.py`).

Layouts below `data.path`:

    classify     cat/a.jpg  cat/more/b.png  dog/c.webp                   the first folder is the class
    segment      images/a.jpg  masks/a.png      or  a.jpg  a_mask.png    paired by the path without its suffix

Masks hold class ids (grey, 16-bit or palette: the index counts, not the colour). Where all masks of the data hold
nothing but 0 and 255, 255 is class 1; otherwise 255 is `data.ignore_index` (by default) and carries no loss. Folders
that are used together must be read alike.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from train.data import DataError, Prepared, cache, hub
from train.data.pictures import Entry, Files, Row, look
from train.data.views import AUGMENTATIONS, Crops, Frame, Pictures, Tiles, overlay

if TYPE_CHECKING:
    from train.config import Config, DataConfig
    from train.data import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".tga", ".jp2")
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations")
MASK_SUFFIX = "_mask"

_FORMAT = 1  # of rows.json; a new one makes the cache look again
_CROP_MARGIN = 8 / 7  # resized pictures are this much larger than the square that `crop` takes out of them
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test"))


@dataclass(frozen=True)
class Folder:
    """A folder that was examined: where it lies, where what was found lies, and its pictures that can be used."""

    path: Path
    directory: Path
    content: str
    rows: list[Row]
    bad_rows: int


# ---- The three calls of a kind of data -------------------------------------------------------------------------------


def prepare(cfg: Config, say: Callable[[str], None]) -> Prepared:
    """Examine every file once, hold out, count classes. Raises DataError."""
    if not all(_paths(cfg).values()):
        raise DataError("data.path is not set. Give data.path=FOLDER: " + _layout(cfg))
    folders = {name: _examine(path, cfg, say) for name, path in _paths(cfg).items()}
    fingerprints = {name: folder.content for name, folder in folders.items()}
    fingerprints.setdefault("data", cache.fingerprint(*fingerprints.values()))
    train, val = _split(folders, cfg.data)
    info = {
        **_describe([row for rows in train for _, row in rows], list(folders.values()), cfg),
        "train_samples": [len(rows) for rows in train],
        "bad_rows": sum(folder.bad_rows for folder in folders.values()),
    }
    info["val_samples"] = len(tiles(_files(val, info, cfg, training=False), cfg, info, ""))
    if info.get("foreground"):
        say("In the masks 255 is read as class 1.")
    elif str(cfg.data.ignore_index) in info.get("values", {}):
        say(f"In the masks {cfg.data.ignore_index} carries no loss.")
    return Prepared(cfg.data.kind, next(iter(folders.values())).directory, fingerprints, info)


def open(prepared: Prepared, cfg: Config) -> tuple[list[Dataset], Dataset]:
    """Training squares, a set per source, and the tiles of the held-out pictures."""
    info, contents = prepared.info, prepared.fingerprints
    folders = {
        name: _load(Path(path).expanduser(), _directory(cfg, contents[name])) for name, path in _paths(cfg).items()
    }
    train, val = _split(folders, cfg.data)
    train_sets: list[Dataset] = [
        crops(_files(rows, info, cfg, training=True), cfg, info, contents["data"]) for rows in train
    ]
    return train_sets, tiles(_files(val, info, cfg, training=False), cfg, info, contents.get("val", contents["data"]))


def show(prepared: Prepared, cfg: Config) -> list[str]:
    """Three training samples, drawn as the model will see them into files beside the prepared data."""
    train_set = open(prepared, cfg)[0][0]
    assert isinstance(train_set, Crops)
    return show_crops(train_set, prepared, cfg)


def inputs(source: Path, cfg: Config, info: Mapping[str, Any], say: Callable[[str], None]) -> Tiles:
    """The pictures of a file or folder, for prediction, as the model of `cfg` and `info` sees them.

    Masks or classes come along where `source` is laid out like training data and has them for every picture. Files that
    cannot be read are named and left out. Raises DataError when nothing is left.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist. Give a picture or a folder of pictures.")
    root = source if source.is_dir() else source.parent
    names = _names(source, None) if source.is_dir() else [source.name]
    if cfg.task.name == "segment":
        entries, problems = _pair(names)
        labelled = not problems
        names = [name for name in names if not _is_mask(name)]
    else:
        entries, problems = _by_folder(names)
        labelled = not problems and {label for _, _, label in entries} <= set(info["classes"])
    if not labelled:
        entries = [(name, None, None) for name in names]
    rows = []
    for entry, found in zip(entries, look(root, entries)):
        if isinstance(found, Row):
            rows.append((root, found))
        else:
            say(f"{root / entry[0]}: {found}; left out.")
    if not rows:
        raise DataError(f"{source} holds no picture that can be read. Known suffixes: {' '.join(SUFFIXES)}.")
    values, foreground = set(_values([row for _, row in rows])), info.get("foreground")
    known = {0, foreground} if foreground else {*range(info["num_classes"]), cfg.data.ignore_index}
    # Of two classes, 0 and 255 are the same as 0 and 1, unless 255 carried no loss when the model learned.
    other, binary = 1 if foreground else 255, info["num_classes"] == 2 and "255" not in info.get("values", {})
    if other in values and values <= {0, other} and (foreground or binary):
        foreground = other
        info = {**info, "foreground": foreground}
        say(f"{source}: {foreground} in these masks is read as class 1.")
    elif strange := sorted(values - known):
        say(f"{source}: the masks hold {strange[:9]}, which this model does not know; they are not compared.")
        rows = [(path, replace(row, mask=None)) for path, row in rows]
    return tiles(_files(rows, info, cfg, training=False), cfg, info, "")


# ---- What the kinds of pictures share --------------------------------------------------------------------------------


def crops(pictures: Pictures, cfg: Config, info: Mapping[str, Any], content: str) -> Crops:
    """The training set over `pictures`. Raises DataError on an augmentation that does not exist."""
    unknown = [name for name in cfg.data.augment if name not in AUGMENTATIONS]
    if unknown:
        raise DataError(f"data.augment has {', '.join(unknown)}. Known: {', '.join(AUGMENTATIONS)}.")
    return Crops(pictures, _frame(cfg, info), cfg.data.augment, content)


def tiles(pictures: Pictures, cfg: Config, info: Mapping[str, Any], content: str) -> Tiles:
    """The evaluation set over `pictures`. A mask's tiles overlap: no pixel is judged without its surroundings."""
    halo = cfg.data.image_size // 8 if cfg.task.name == "segment" else 0
    return Tiles(pictures, _frame(cfg, info), halo, content)


def _frame(cfg: Config, info: Mapping[str, Any]) -> Frame:
    return Frame(cfg.data.image_size, info["mean"], info["std"], cfg.data.ignore_index)


def normalisation(cfg: Config, mean: Sequence[float], square: Sequence[float]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel by which images are normalised: the checkpoint's, or the data's own, from
    the mean of pixels and of their squares.

    Rounded to four digits, because the last bits of a sum differ between machines and these numbers enter every sample.
    """
    if found := checkpoint(cfg).get("mean"):
        return found, checkpoint(cfg)["std"]
    spread = [max(math.sqrt(max(s - m * m, 0.0)), 1e-2) for m, s in zip(mean, square)]
    return [round(m, 4) for m in mean], [round(s, 4) for s in spread]


def hold_out(names: Sequence[str], groups: Sequence[Any], data: DataConfig) -> np.ndarray:
    """bool [n]: which are validation data, by the order of their hashes inside each group (a class), so that every fold
    and every fraction has its share of each class, and a small folder never comes out empty."""
    held = np.zeros(len(names), bool)
    order = sorted(range(len(names)), key=lambda index: cache.share(names[index]))
    size, position = Counter(groups), Counter[Any]()
    for index in order:
        at = position[groups[index]]
        position[groups[index]] += 1
        if data.fold is not None:
            held[index] = at % data.folds == data.fold
        else:
            held[index] = at < math.floor(size[groups[index]] * data.val_fraction + 0.5)
    if not held.any() and order:
        held[order[0]] = True
    return held


def show_crops(train_set: Crops, prepared: Prepared, cfg: Config) -> list[str]:
    """Draw three samples of `train_set` beside the prepared data; what they hold and where they were drawn, as text."""
    info, lines = prepared.info, []
    directory = prepared.directory.with_name(f"{prepared.directory.name}-shown")
    for index in range(min(3, len(train_set))):
        sample = train_set.get(index, 0, cfg.seed)
        pixels = np.clip(sample["image"].transpose(1, 2, 0) * train_set.frame.std + train_set.frame.mean, 0, 1)
        mask = sample.get("mask", np.zeros(pixels.shape[:2], np.int64))
        text = f"{train_set.pictures.names[index]}: image {'x'.join(map(str, sample['image'].shape))}"
        if "label" in sample:
            text += f", class {int(sample['label'])} ({info['classes'][int(sample['label'])]})"
        else:
            text += f", mask {_shares(_histogram(mask))}"
        drawn = Image.fromarray(overlay(pixels, mask, info["num_classes"]))
        zoom = max(1, 256 // cfg.data.image_size)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{index}.png"
            drawn.resize((drawn.width * zoom, drawn.height * zoom), Image.Resampling.NEAREST).save(path)
            text += f"\n  drawn in {path}"
        except OSError as error:
            text += f"\n  not drawn: {error}"
        lines.append(text)
    return lines


def stem(name: str) -> str:
    """What a picture and its mask have in common: the path without `images` or `masks`, `_mask` and the suffix."""
    path = PurePosixPath(name)
    sides = len(path.parts) > 1 and path.parts[0].lower() in IMAGE_FOLDERS + MASK_FOLDERS
    parts = path.parts[1:] if sides else path.parts
    return str(PurePosixPath(*parts).with_name(path.stem.removesuffix(MASK_SUFFIX) or path.stem))


# ---- Which files belong together -------------------------------------------------------------------------------------


def _names(root: Path, glob: str | None) -> list[str]:
    """Pictures below `root`, sorted, hidden ones left out. Links to folders are followed: class folders often are."""
    if glob is not None:
        found = [path.relative_to(root) for path in root.glob(glob) if path.is_file()]
    else:
        walk = os.walk(root, followlinks=True)
        found = [Path(os.path.relpath(directory, root), file) for directory, _, files in walk for file in files]
    return sorted(
        path.as_posix()
        for path in found
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)
    )


def _by_folder(names: Sequence[str]) -> tuple[list[Entry], list[tuple[str, str]]]:
    entries: list[Entry] = [(name, None, name.split("/")[0]) for name in names if "/" in name]
    return entries, [(name, "lies in no class folder") for name in names if "/" not in name]


def _pair(names: Sequence[str]) -> tuple[list[Entry], list[tuple[str, str]]]:
    masks: dict[str, str] = {}
    pictures: dict[str, str] = {}
    problems = []
    for name in names:
        side = masks if _is_mask(name) else pictures
        if stem(name) in side:
            problems.append((name, f"has the stem of {side[stem(name)]}"))
        else:
            side[stem(name)] = name
    problems += [(name, "has no mask of its stem") for key, name in pictures.items() if key not in masks]
    problems += [(name, "is a mask without a picture") for key, name in masks.items() if key not in pictures]
    return [(name, masks[key], None) for key, name in pictures.items() if key in masks], problems


def _is_mask(name: str) -> bool:
    path = PurePosixPath(name)
    return (len(path.parts) > 1 and path.parts[0].lower() in MASK_FOLDERS) or path.stem.endswith(MASK_SUFFIX)


def _layout(cfg: Config) -> str:
    if cfg.task.name == "segment":
        return "images/NAME.jpg with masks/NAME.png, or NAME.jpg with NAME_mask.png."
    return "a folder per class, e.g. cat/1.jpg and dog/2.jpg."


# ---- Examining folders -----------------------------------------------------------------------------------------------


def _paths(cfg: Config) -> dict[str, str]:
    """Name of the fingerprint -> folder: `data`, or `data0`, `data1`, ... for several sources; `val` last."""
    sources = {f"data{index}": source.path for index, source in enumerate(cfg.data.sources)}
    return {**(sources or {"data": cfg.data.path or ""}), **({"val": cfg.data.val_path} if cfg.data.val_path else {})}


def _examine(path: str, cfg: Config, say: Callable[[str], None]) -> Folder:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{path} is not a folder. Expected: " + _layout(cfg))
    segment = cfg.task.name == "segment"
    names = _names(root, cfg.data.glob)
    entries, problems = _pair(names) if segment else _by_folder(names)
    if not entries:
        without = f"none with a {'mask' if segment else 'class'}"
        raise DataError(f"{path} holds {len(names)} pictures, {without}. Expected: {_layout(cfg)}")
    found = sorted({label or "" for _, _, label in entries})
    if not segment and set(found) <= _SPLITS:
        give = f"Give data.path={path}/train and data.val_path={path}/val."
        raise DataError(f"{path} holds {', '.join(found)}, which are no classes. {give}")
    content = cache.fingerprint(cache.identify(cache.cache_root(cfg), root, [(name, root / name) for name in names]))
    directory = _directory(cfg, content)
    if not (directory / "rows.json").exists():
        say(f"Looking at {len(entries):,} pictures in {path}")
        cache.publish(directory, lambda new: _write_rows(new, root, content, entries, problems, say))
    folder = _load(root, directory)
    # One bad file among few is more than any sensible fraction: it is named and set aside, and only 0 refuses it.
    refusal = cache.too_many_bad(len(folder.rows) + folder.bad_rows, folder.bad_rows, cfg.data)
    if refusal and (folder.bad_rows > 1 or cfg.data.max_bad_fraction == 0 or not folder.rows):
        bad = [json.loads(line) for line in (directory / "quarantine.jsonl").read_text().splitlines()]
        raise DataError("\n  ".join([refusal, *(f"{row['file']}: {row['reason']}" for row in bad[:5])]))
    return folder


def _write_rows(
    directory: Path,
    root: Path,
    content: str,
    entries: list[Entry],
    problems: list[tuple[str, str]],
    say: Callable[[str], None],
) -> None:
    quarantine, rows, values = cache.Quarantine(directory / "quarantine.jsonl"), [], Counter[int]()

    def set_aside(name: str, reason: str) -> None:
        quarantine.bad(name, None, reason)
        if quarantine.bad_rows <= 10:
            say(f"{root / name}: {reason}; set aside.")

    for name, reason in problems:
        set_aside(name, reason)
    for (name, _, _), found in zip(entries, look(root, entries)):
        if isinstance(found, Row):
            quarantine.good()
            rows.append(asdict(found))
            values.update({int(value): count for value, count in found.values.items()})
        else:
            set_aside(name, found)
    if values:
        say(f"Values in the masks: {_shares(values)}")
    text = json.dumps({"content": content, "bad_rows": quarantine.bad_rows, "rows": rows})
    (directory / "rows.json").write_text(text)


def _directory(cfg: Config, content: str) -> Path:
    return cache.cache_root(cfg) / "images" / cache.fingerprint(_FORMAT, content, cfg.task.name == "segment")[:32]


def _load(path: Path, directory: Path) -> Folder:
    try:
        found = json.loads((directory / "rows.json").read_text())
    except OSError:
        raise DataError(f"{path} is not prepared on this machine. Run `gearshift prepare` with data.path.") from None
    return Folder(path, directory, found["content"], [Row(**row) for row in found["rows"]], found["bad_rows"])


Rows = list[tuple[Path, Row]]


def _split(folders: dict[str, Folder], data: DataConfig) -> tuple[list[Rows], Rows]:
    """The rows that are trained on, per folder, and those held out, in the order of their hashes: the first few of them
    are a fair sample."""
    train: list[Rows] = []
    val: Rows = [(folders["val"].path, row) for row in folders["val"].rows] if "val" in folders else []
    for folder in (folder for name, folder in folders.items() if name != "val"):
        rows = [(folder.path, row) for row in folder.rows]
        held = np.zeros(len(rows), bool)
        if "val" not in folders:
            held = hold_out([row.name for row in folder.rows], [row.label for row in folder.rows], data)
        train.append([row for row, out in zip(rows, held) if not out])
        val += [row for row, out in zip(rows, held) if out]
        if not train[-1]:
            raise DataError(
                f"{folder.path} holds {len(rows)} usable pictures and all of them are held out. Add pictures, or give "
                f"validation data of its own with data.val_path=FOLDER."
            )
    return train, sorted(val, key=lambda row: cache.share(row[1].name))


def _files(rows: Rows, info: Mapping[str, Any], cfg: Config, *, training: bool) -> Files:
    side = cfg.data.image_size if cfg.data.resize else None
    if side and training and "crop" in cfg.data.augment:
        side = math.ceil(side * _CROP_MARGIN)
    labels = {name: index for index, name in enumerate(info["classes"])}
    return Files(rows, labels, channels=info["channels"], side=side, foreground=info.get("foreground"))


# ---- Classes ---------------------------------------------------------------------------------------------------------


def _describe(train: list[Row], folders: list[Folder], cfg: Config) -> dict[str, Any]:
    """What a model and a task need to know: classes and how often they occur, channels, normalisation."""
    everything = [row for folder in folders for row in folder.rows]
    channels = checkpoint(cfg).get("channels") or max(row.channels for row in everything)
    in_channels = [[c % row.channels for c in range(channels)] for row in train]
    mean = np.mean([np.take(row.mean, chosen) for row, chosen in zip(train, in_channels)], axis=0).tolist()
    square = np.mean([np.take(row.square, chosen) for row, chosen in zip(train, in_channels)], axis=0).tolist()
    mean, std = normalisation(cfg, mean, square)
    if cfg.task.name == "segment":
        _read_alike(folders, cfg)
    count_classes = _mask_classes if cfg.task.name == "segment" else _folder_classes
    return {**count_classes(train, everything, cfg), "channels": channels, "mean": mean, "std": std}


def _folder_classes(train: list[Row], everything: list[Row], cfg: Config) -> dict[str, Any]:
    counts = Counter(row.label or "" for row in train)
    classes = sorted(counts, key=lambda name: (0, int(name), name) if name.isdigit() else (1, 0, name))
    strangers = {row.label or "" for row in everything} - set(classes)
    if strangers:
        without = f"Held-out classes without a training picture: {', '.join(sorted(strangers))}."
        raise DataError(f"{without} Known: {', '.join(classes)}.")
    if len(classes) < 2:
        raise DataError(f"The only class is {classes[0]}. Give a folder for each of two classes or more.")
    if cfg.data.num_classes not in (None, len(classes)):
        given = f"data.num_classes={cfg.data.num_classes}"
        raise DataError(f"{given}: there are {len(classes)} class folders, {', '.join(classes)}. Leave it null.")
    return {"classes": classes, "num_classes": len(classes), "class_counts": [counts[name] for name in classes]}


def _read_alike(folders: list[Folder], cfg: Config) -> None:
    """Raise DataError where 255 would be class 1 in one folder by itself, and something else in all of them."""
    found = {folder.path: set(_values(folder.rows)) for folder in folders}
    binary = [path for path, values in found.items() if values == {0, 255}]
    ids = [path for path, values in found.items() if values - {0, 255}]
    if binary and ids and cfg.data.num_classes in (None, 2):
        raise DataError(
            f"The masks of {binary[0]} hold 0 and 255, those of {ids[0]} hold {sorted(found[ids[0]])[:9]}: 255 cannot be "
            "class 1 here and carry no loss there. Rewrite the masks of one of them so that both hold the same ids."
        )


def _mask_classes(train: list[Row], everything: list[Row], cfg: Config) -> dict[str, Any]:
    values = _values(everything)
    given, ignore = cfg.data.num_classes, cfg.data.ignore_index
    foreground = 255 if set(values) == {0, 255} and given in (None, 2) else None
    ids = {0, 1} if foreground else set(values) - {ignore}
    count = given or (max(ids, default=0) + 1)
    wrong = sorted(ids - set(range(count)))
    if wrong or (given is None and ids != set(range(count))) or count < 2:
        strange = {str(value) for value in (wrong or ids)}
        where = next((row.mask for row in everything if strange & set(row.values)), None)
        parts = [f"The masks hold {_shares(values)}."]
        if wrong:
            parts.append(f"{', '.join(map(str, wrong[:9]))} is unknown (first in {where}).")
        parts.append(
            f"Needed: ids from 0 to data.num_classes - 1, and data.ignore_index={ignore} where no loss is wanted."
        )
        if where and where.lower().endswith((".jpg", ".jpeg")):
            parts.append("JPEG blurs the values of masks: save them as PNG.")
        parts.append(f"Rewrite the masks, or set data.num_classes={max(max(ids, default=0), 1) + 1} if these are ids.")
        raise DataError(" ".join(parts))
    seen = _values(train)
    counts = [seen[0], seen[255]] if foreground else [seen[value] for value in range(count)]
    if unseen := [value for value in sorted(ids) if not counts[value]]:
        raise DataError(
            f"Class {', '.join(map(str, unseen[:9]))} of the masks is in no picture that is trained on, only in held-out "
            "ones. Add pictures with it, or choose other held-out ones: data.val_fraction, data.fold or data.val_path."
        )
    return {
        "classes": [str(value) for value in range(count)],
        "num_classes": count,
        "class_counts": counts,
        "foreground": foreground,
        "values": {str(value): values[value] for value in sorted(values)},
    }


def _values(rows: list[Row]) -> Counter[int]:
    total = Counter[int]()
    for row in rows:
        total.update({int(value): count for value, count in row.values.items()})
    return total


def _histogram(mask: np.ndarray) -> Counter[int]:
    values, counts = np.unique(mask, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist())))


def _shares(values: Counter[int]) -> str:
    """`0 (93.1 %), 1 (6.9 %)`"""
    total = sum(values.values())
    shown = [f"{value} ({values[value] / total:.1%})" for value in sorted(values)[:20]]
    return ", ".join([*shown, *([f"... {len(values)} values"] if len(values) > 20 else [])])


def checkpoint(cfg: Config) -> dict[str, Any]:
    """What the model of `model.path` expects of images: `channels`, `mean` and `std` as far as it says. {} from scratch.

    A run of ours keeps all of it; a model of transformers has three channels and a `preprocessor_config.json`.
    """
    if cfg.model.path is None:
        return {}
    directory = Path(cfg.model.path).expanduser()
    if (directory / "data.json").is_file():
        return {
            key: json.loads((directory / "data.json").read_text())["info"][key] for key in ("channels", "mean", "std")
        }
    file = directory / "preprocessor_config.json"
    if not directory.is_dir():
        from huggingface_hub import errors, hf_hub_download

        name, revision = hub.parse(cfg.model.path) or (cfg.model.path, None)
        commit = hub.commit("model", name, revision or cfg.model.revision, cache.cache_root(cfg))
        try:
            file = Path(hf_hub_download(name, file.name, revision=commit))
        except Exception as error:
            if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
                return {"channels": 3}
            raise hub.explain(error, "model", name, commit) from None
    said = json.loads(file.read_text()) if file.is_file() else {}
    mean, std = (said.get("image_mean"), said.get("image_std")) if said.get("do_normalize", True) else (0.0, 1.0)
    if mean is None or std is None:
        return {"channels": 3}
    return {"channels": 3, "mean": np.broadcast_to(mean, 3).tolist(), "std": np.broadcast_to(std, 3).tolist()}
