"""Pictures of any kind become samples: what is read, what is refused, what is held out, and that views are pure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train import data
from train.config import Config, DataConfig, SourceConfig
from train.data import DataError, digits, images, pictures, views
from train.data.views import Frame, Tiles, spans, training_view, uniforms


def _cfg(tmp_path: Path, path: Path | None = None, task: str = "segment", **settings: Any) -> Config:
    cfg = Config()
    cfg.task.name = task
    cfg.data = DataConfig(
        kind="images", path=str(path or tmp_path / "own"), cache_dir=str(tmp_path / "cache"), image_size=32
    )
    for key, value in settings.items():
        setattr(cfg.data, key, value)
    return cfg


def _noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder as people have them: odd sizes, grey, RGBA, palette and 16-bit, one picture turned, one file corrupt."""
    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for i in range(8):
        height, width = 37 + 5 * i, 61 - 3 * i
        pixels = _noise(height, width, 1 if i == 1 else 4 if i == 2 else 3, seed=i)
        mask = np.zeros((height, width), np.uint8)
        mask[5:20, 7:25] = 1 + i % 2
        mask[:2] = 255
        picture, ids = Image.fromarray(pixels), Image.fromarray(mask)
        if i == 3:
            picture = picture.quantize(16)
        if i == 4:
            picture = Image.fromarray(_noise(height, width, 1).astype(np.uint16) * 257)
        if i % 2:
            ids.putpalette(bytes(range(256)) * 3)
        exif = Image.Exif()
        if i == 5:  # stored lying down, to be turned upright
            picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
        picture.save(root / "images" / f"p{i}.png", exif=exif)
        ids.save(root / "masks" / f"p{i}.png")
    whole = (root / "images" / "p0.png").read_bytes()
    (root / "images" / "broken.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (60, 40)).save(root / "masks" / "broken.png")
    return root


def test_an_own_folder_is_read_and_its_corrupt_file_is_named(own: Path, tmp_path: Path) -> None:
    said: list[str] = []
    cfg = _cfg(tmp_path)
    prepared = data.prepare(cfg, said.append)
    assert prepared.info["num_classes"] == 3
    assert prepared.info["bad_rows"] == 1
    assert any("broken.png" in line for line in said)
    assert any("255 (" in line for line in said), "the values that were found are shown"
    quarantined = [json.loads(line) for line in (prepared.directory / "quarantine.jsonl").read_text().splitlines()]
    assert [row["file"] for row in quarantined] == ["images/broken.png"]
    assert quarantined[0]["reason"]

    train_sets, val_set = data.open_datasets(prepared, cfg)
    assert [len(train_sets[0]), len(val_set)] == [prepared.info["train_samples"][0], prepared.info["val_samples"]]
    for index in range(len(train_sets[0])):
        sample = train_sets[0].get(index, 0, 0)
        assert sample["image"].shape == (3, 32, 32)
        assert sample["image"].dtype == np.float32
        assert sample["mask"].shape == (32, 32)
        assert set(np.unique(sample["mask"])) <= {0, 1, 2, 255}
    again: list[str] = []
    assert data.prepare(cfg, again.append) == prepared
    assert again == ["In the masks 255 carries no loss."], "what is prepared is not looked at again"
    assert "mask 0" in data.show(prepared, cfg)[0]


def test_more_than_one_bad_file_stops_unless_it_is_allowed(own: Path, tmp_path: Path) -> None:
    (own / "images" / "text.png").write_text("no picture")
    (own / "masks" / "p0.png").write_text("no mask")
    said: list[str] = []
    with pytest.raises(DataError, match=r"max_bad_fraction[\s\S]*text.png: has no mask"):
        data.prepare(_cfg(tmp_path), said.append)
    assert data.prepare(_cfg(tmp_path, max_bad_fraction=0.4), said.append).info["bad_rows"] == 3
    assert any("its mask masks/p0.png: not a picture" in line for line in said)
    with pytest.raises(DataError, match="max_bad_fraction=0 "):
        (own / "images" / "text.png").unlink()
        data.prepare(_cfg(tmp_path, max_bad_fraction=0.0), lambda _: None)


def test_the_fingerprint_follows_the_content_and_not_the_place(own: Path, tmp_path: Path) -> None:
    first = data.prepare(_cfg(tmp_path), lambda _: None).fingerprints
    shutil.copytree(own, tmp_path / "elsewhere")
    said: list[str] = []
    assert data.prepare(_cfg(tmp_path, tmp_path / "elsewhere"), said.append).fingerprints == first
    assert not any("Looking" in line for line in said), "the same content was looked at before"
    Image.new("L", (61, 37), 1).save(tmp_path / "elsewhere" / "masks" / "p0.png")
    assert data.prepare(_cfg(tmp_path, tmp_path / "elsewhere"), said.append).fingerprints != first


def _masks(root: Path, values: list[int], suffix: str = ".png") -> Path:
    root.mkdir(parents=True)
    for i in range(4):
        Image.fromarray(_noise(20, 24, 3)).save(root / f"a{i}.png")
        mask = np.asarray(values, np.uint8)[np.arange(20 * 24).reshape(20, 24) % len(values)]
        Image.fromarray(mask).save(root / f"a{i}_mask{suffix}", quality=50)
    return root


def test_masks_of_0_and_255_have_a_foreground_and_255_beside_others_is_ignored(tmp_path: Path) -> None:
    cfg = _cfg(tmp_path, _masks(tmp_path / "binary", [0, 0, 255]))
    prepared = data.prepare(cfg, lambda _: None)
    sample = data.open_datasets(prepared, cfg)[0][0].get(0, 0, 0)
    assert prepared.info["num_classes"] == 2
    assert np.mean(sample["mask"][sample["mask"] != 255]) == pytest.approx(1 / 3, abs=0.01)
    assert prepared.info["class_counts"][0] == 2 * prepared.info["class_counts"][1]

    prepared = data.prepare(_cfg(tmp_path, _masks(tmp_path / "ignored", [0, 1, 255])), lambda _: None)
    assert prepared.info["class_counts"] == [480, 480]


@pytest.mark.parametrize(("train", "val"), [([0, 255], [0, 1]), ([0, 1], [0, 255])])
def test_folders_whose_masks_are_read_differently_are_not_mixed(tmp_path: Path, train: list, val: list) -> None:
    cfg = _cfg(tmp_path, _masks(tmp_path / "train", train), val_path=str(_masks(tmp_path / "val", val)))
    with pytest.raises(DataError, match="255 cannot be class 1 here and carry no loss there"):
        data.prepare(cfg, lambda _: None)


def test_a_class_that_is_only_held_out_is_refused(tmp_path: Path) -> None:
    cfg = _cfg(tmp_path, _masks(tmp_path / "train", [0, 1]), val_path=str(_masks(tmp_path / "val", [0, 1, 2])))
    with pytest.raises(DataError, match="Class 2 of the masks is in no picture that is trained on"):
        data.prepare(cfg, lambda _: None)


@pytest.mark.parametrize(("trained", "judged"), [([0, 255], [0, 1]), ([0, 1], [0, 255]), ([0, 255], [0, 255])])
def test_masks_to_compare_with_are_read_by_their_own_values(tmp_path: Path, trained: list, judged: list) -> None:
    said: list[str] = []
    cfg = _cfg(tmp_path, _masks(tmp_path / "train", trained))
    info = data.prepare(cfg, said.append).info
    assert ("In the masks 255 is read as class 1." in said) == (trained == [0, 255])
    said.clear()
    sample = images.inputs(_masks(tmp_path / "judged", judged), cfg, info, said.append).get(0)
    assert any("is read as class 1" in line for line in said) == (trained != judged)
    assert {0, 1} <= set(np.unique(sample["mask"])) <= {0, 1, 255}, "beyond the picture 255 carries no loss"


def test_unknown_values_of_masks_are_refused_and_shown(tmp_path: Path) -> None:
    strange = _masks(tmp_path / "strange", [0, 38, 75])
    with pytest.raises(DataError, match=r"0 \(33.3%\), 38 \(33.3%\), 75 .*data.num_classes=76"):
        data.prepare(_cfg(tmp_path, strange), lambda _: None)
    with pytest.raises(DataError, match=r"75 is unknown \(first in a0_mask.png\)"):
        data.prepare(_cfg(tmp_path, strange, num_classes=40), lambda _: None)
    assert data.prepare(_cfg(tmp_path, strange, num_classes=76), lambda _: None).info["num_classes"] == 76
    assert data.prepare(_cfg(tmp_path, strange, num_classes=39, ignore_index=75), lambda _: None)
    with pytest.raises(DataError, match="JPEG blurs"):
        data.prepare(_cfg(tmp_path, _masks(tmp_path / "jpeg", [0, 1, 9], ".jpg")), lambda _: None)


def _classes(root: Path, names: list[str], each: int = 5) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(_noise(10 + i, 12, 1, seed=100 * names.index(name) + i)).save(root / name / f"{i}.png")
    return root


def test_classes_are_folders_and_folds_hold_each_of_them_out_once(tmp_path: Path) -> None:
    root = _classes(tmp_path / "own", ["10", "9", "cat"])
    held: list[str] = []
    for fold in range(5):
        cfg = _cfg(tmp_path, task="classify", fold=fold)
        prepared = data.prepare(cfg, lambda _: None)
        train_sets, val_set = data.open_datasets(prepared, cfg)
        assert isinstance(val_set, Tiles)
        names = list(val_set.pictures.names)
        assert sorted(name.split("/")[0] for name in names) == ["10", "9", "cat"], "each class in each fold"
        assert not set(names) & set(train_sets[0].pictures.names)  # type: ignore[attr-defined]
        held += names
    assert sorted(held) == sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    assert prepared.info["classes"] == ["9", "10", "cat"]
    assert prepared.info["channels"] == 1
    assert train_sets[0].get(0, 0, 0)["image"].shape == (1, 32, 32)
    assert "mask" not in train_sets[0].ignore


def test_layouts_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    _classes(tmp_path / "split" / "train", ["a", "b"])
    _classes(tmp_path / "split" / "val", ["a", "b"])
    with pytest.raises(DataError, match=r"data.path=.*/train and data.val_path=.*/val"):
        data.prepare(_cfg(tmp_path, tmp_path / "split", task="classify"), lambda _: None)
    cfg = _cfg(tmp_path, tmp_path / "split/train", task="classify", val_path=str(tmp_path / "split/val"))
    assert data.prepare(cfg, lambda _: None).info["val_samples"] == 10
    with pytest.raises(DataError, match="none with a mask"):
        data.prepare(_cfg(tmp_path, tmp_path / "split/train"), lambda _: None)
    with pytest.raises(DataError, match="is not a folder"):
        data.prepare(_cfg(tmp_path, tmp_path / "nowhere"), lambda _: None)


def test_bombs_and_colours_that_are_no_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(_noise(30, 30, 3)).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match="colours, which say no class ids"):
        pictures.read_mask(tmp_path / "colours.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="30x30 pixels, more than 600"):
        pictures.read_picture(tmp_path / "colours.png")


def test_every_mode_reads_to_the_same_picture(tmp_path: Path) -> None:
    grey = _noise(9, 7, 1)
    for mode in ("L", "RGB", "RGBA", "LA", "P", "I;16", "F"):
        path = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode == 'F' else 'png'}"
        if mode == "I;16":
            Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        elif mode == "F":
            Image.fromarray(grey.astype(np.float32) / 255).save(path)
        else:
            Image.fromarray(grey).convert(mode).save(path)
        found = views.unit(pictures.read_picture(path, channels=3))
        np.testing.assert_allclose(found, np.repeat(grey[..., None], 3, 2) / 255, atol=1e-6, err_msg=mode)


# ---- Views -----------------------------------------------------------------------------------------------------------


FRAME = Frame(32, [0.0], [1.0], -1)


class _One:
    """One picture, whose pixels say where they are."""

    names, masked = ["one.png"], True

    def __init__(self, height: int, width: int) -> None:
        self.sizes = self.full_sizes = np.array([[height, width]])
        self.picture = np.arange(height * width, dtype=np.float32).reshape(height, width, 1) / (height * width)
        self.mask = np.arange(height * width, dtype=np.int32).reshape(height, width) % 251

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.picture, self.mask


@given(length=st.integers(1, 400), size=st.integers(4, 64), halo=st.integers(0, 1))
@settings(max_examples=200, deadline=None)
def test_spans_tile_any_length_and_keep_their_halo(length: int, size: int, halo: int) -> None:
    halo *= size // 8
    found = spans(length, size, halo)
    assert [s.start for _, s in found] + [length] == [0, *(s.stop for _, s in found)]
    for start, owned in found:
        assert start <= owned.start < owned.stop <= start + size
        assert owned.start == 0 or owned.start - start >= halo
        assert owned.stop == length or start + size - owned.stop >= halo
        assert length < size or 0 <= start <= length - size


@pytest.mark.parametrize("shape", [(20, 33), (64, 64), (97, 41), (32, 32)])
def test_tiles_hold_each_pixel_once(shape: tuple[int, int]) -> None:
    one = _One(*shape)
    tiles = Tiles(one, FRAME, 4, "")
    image, mask = np.full(shape, np.nan), np.full(shape, -1)
    valid = 0
    for index in range(len(tiles)):
        sample = tiles.get(index)
        _, rows, columns, inside_rows, inside_columns = tiles.place(index)
        image[rows, columns] = sample["image"][0][inside_rows, inside_columns]
        mask[rows, columns] = sample["mask"][inside_rows, inside_columns]
        valid += int((sample["mask"] >= 0).sum())
    np.testing.assert_array_equal(image, one.picture[..., 0])
    np.testing.assert_array_equal(mask, one.mask)
    assert valid == mask.size


def test_a_view_is_a_function_of_its_key_and_its_mask_follows() -> None:
    one = _One(50, 70)
    names = ["flip", "crop", "scale", "shift"]

    def view(*key: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = training_view(one.picture, one.mask, FRAME, names, key=key)  # type: ignore[arg-type]
        assert mask is not None
        return image[0], mask

    image, mask = view(0, 1, 2)
    np.testing.assert_array_equal(image, view(0, 1, 2)[0])
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not np.array_equal(image, view(*other)[0])
    for index in range(20):
        image, mask = view(0, 0, index)
        assert _apart(image, mask) <= 36, "half a row and half a pixel: the nearest one"
        assert _apart(image, mask[:, ::-1]) > 36


def _apart(image: np.ndarray, mask: np.ndarray) -> float:
    """How far the mask's pixels come from the image's, both in pixels of the 70 wide picture read row by row."""
    apart = (image * 50 * 70 - mask + 125.5) % 251 - 125.5
    return float(np.abs(apart[mask >= 0]).max())


def test_one_more_augmentation_moves_none_of_the_others() -> None:
    one = _One(50, 70)
    plain = training_view(one.picture, None, FRAME, ["crop"], key=(0, 0, 5))[0]
    flipped = training_view(one.picture, None, FRAME, ["crop", "flip"], key=(0, 0, 5))[0]
    assert np.array_equal(plain, flipped) or np.array_equal(plain, flipped[..., ::-1])
    coloured = training_view(one.picture, None, FRAME, ["crop", "color"], key=(0, 0, 5))[0]
    assert np.corrcoef(plain.ravel(), coloured.ravel())[0, 1] > 0.99
    assert not np.array_equal(plain, coloured)


def test_draws_are_the_same_on_every_machine_and_release() -> None:
    assert uniforms((0, 1, 2), 3).tolist() == [0.9863776640469563, 0.3797549478660399, 0.41565444407401886]


# ---- Digits ----------------------------------------------------------------------------------------------------------


def test_scenes_are_drawn_from_their_number_alone_and_hold_out_whole_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "TRAIN_SCENES", 6)
    monkeypatch.setattr(digits, "VAL_SCENES", 4)
    used: dict[int, np.ndarray] = {}
    scene = digits.scene

    def spy(number: int, pool: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        used[len(pool)] = pool
        return scene(number, pool, labels)

    monkeypatch.setattr(digits, "scene", spy)
    cfg = _cfg(tmp_path, kind="digit_scenes", image_size=64, path=None)
    cfg.seed = 7
    prepared = data.prepare(cfg, lambda _: None)
    train, held = sorted(used.values(), key=len, reverse=True)
    assert len(train) + len(held) == 1797
    as_rows = [{row.tobytes() for row in pool} for pool in (train, held)]
    assert not as_rows[0] & as_rows[1]
    cfg.seed, cfg.data.cache_dir = 8, str(tmp_path / "other")
    assert data.prepare(cfg, lambda _: None).fingerprints == prepared.fingerprints

    sample = data.open_datasets(prepared, cfg)[1].get(0, 0, 0)
    assert sample["image"].shape == (3, 64, 64)
    assert set(np.unique(sample["mask"])) <= set(range(11))
    assert (sample["mask"] > 0).any()


def test_held_out_digits_are_a_fifth_of_each_class(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    cfg = _cfg(tmp_path, task="classify", kind="digits", image_size=8, path=None, val_fraction=0.2)
    prepared = data.prepare(cfg, lambda _: None)
    train_sets, val_set = data.open_datasets(prepared, cfg)
    assert len(train_sets[0]) + len(val_set) == 1797
    labels = [int(val_set.get(i, 0, 0)["label"]) for i in range(len(val_set))]
    assert np.bincount(labels).min() >= 34
    assert images.hold_out(["a", "b"], [0, 0], cfg.data).sum() == 1, "never nothing"


def test_several_sources_and_validation_data_of_its_own(tmp_path: Path) -> None:
    parts = [SourceConfig(str(_classes(tmp_path / name, ["a", "b"], each)), 1.0) for name, each in (("x", 3), ("y", 4))]
    cfg = _cfg(tmp_path, task="classify", path=None, sources=parts, val_path=str(_classes(tmp_path / "z", ["b"])))
    prepared = data.prepare(cfg, lambda _: None)
    assert prepared.info["train_samples"] == [6, 8]
    assert sorted(prepared.fingerprints) == ["data", "data0", "data1", "val"]
    train_sets, val_set = data.open_datasets(prepared, cfg)
    assert [len(train_set) for train_set in train_sets] == [6, 8]
    assert {int(val_set.get(i, 0, 0)["label"]) for i in range(len(val_set))} == {1}
    cfg.data.val_path = str(_classes(tmp_path / "other", ["c"]))
    with pytest.raises(DataError, match=r"without a training picture: c. Known: a, b"):
        data.prepare(cfg, lambda _: None)
