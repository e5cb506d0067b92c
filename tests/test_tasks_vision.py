"""Classification and segmentation: losses that are sums, metrics over whole pictures, predictions as files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import equivalence
from tests import ranks
from train import data, models
from train.config import Config, DataConfig
from train.data import DataError, Prepared
from train.data.loader import Loader
from train.order import Order
from train.tasks.classify import Classify
from train.tasks.segment import Segment

SIZE = 16


class _Fixed(nn.Module):
    """Answers with given logits: a loss without a network."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits[: len(image)]


def _cfg(tmp_path: Path, task: str, **settings: Any) -> Config:
    cfg = Config()
    cfg.task.name, cfg.model.name = task, "unet" if task == "segment" else "convnet"
    cfg.model.channels, cfg.model.num_layers, cfg.model.patch_size, cfg.model.dropout = 8, 2, 1, 0.1
    cfg.data = DataConfig(
        kind="images", path=str(tmp_path / "own"), cache_dir=str(tmp_path / "cache"), image_size=SIZE,
        augment=["flip", "crop", "scale", "color"], val_fraction=0.25, **settings,
    )  # fmt: skip
    return cfg


def _prepared(classes: int, **info: Any) -> Prepared:
    known = {"num_classes": classes, "classes": [str(c) for c in range(classes)], "channels": 3}
    return Prepared("images", Path("."), {}, {**known, "class_counts": [1] * classes, **info})


def _task(tmp_path: Path, name: str, classes: int = 3, **info: Any) -> Any:
    return (Segment if name == "segment" else Classify)(_cfg(tmp_path, name), _prepared(classes, **info))


def _rows(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


# ---- Losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_classes_is_cross_entropy_summed(tmp_path: Path) -> None:
    task, logits = _task(tmp_path, "classify"), torch.randn(4, 3)
    batch = {"image": torch.zeros(4, 3, 8, 8), "label": torch.tensor([0, 2, 1, 1]), "weight": torch.ones(4)}
    loss, count = task.loss(_Fixed(logits), batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["label"], reduction="sum"))
    assert count == task.count(batch) == 4

    task.cfg.task.label_smoothing = 0.2
    smoothed = F.cross_entropy(logits, batch["label"], reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(task.loss(_Fixed(logits), batch)[0], smoothed)


def test_balanced_weights_make_rare_classes_weigh_as_much_as_common_ones(tmp_path: Path) -> None:
    cfg = _cfg(tmp_path, "classify")
    cfg.task.class_weights = "balanced"
    weights = Classify(cfg, _prepared(3, class_counts=[60, 30, 10])).class_weights(torch.zeros(()))
    assert weights is not None
    torch.testing.assert_close(weights * torch.tensor([0.6, 0.3, 0.1]), torch.full((3,), 1 / 3))
    cfg.task.class_weights = [2.0, 2.0, 2.0]
    given = Classify(cfg, _prepared(3, class_counts=[60, 30, 10])).class_weights(torch.zeros(()))
    torch.testing.assert_close(given, torch.ones(3))
    with pytest.raises(DataError, match=r"task.class_weights=.* 4 classes"):
        Classify(cfg, _prepared(4))


def test_the_loss_of_pixels_is_cross_entropy_and_dice_of_each_sample(tmp_path: Path) -> None:
    task, logits = _task(tmp_path, "segment"), torch.randn(2, 3, 4, 4)
    mask = torch.randint(0, 2, (2, 4, 4))  # class 2 occurs nowhere
    mask[0, :2] = 255
    batch = {"image": torch.zeros(2, 3, 4, 4), "mask": mask, "weight": torch.ones(2)}
    expected = torch.zeros(())
    for row in range(2):
        valid = mask[row] != 255
        expected += F.cross_entropy(logits[row][:, valid].T, mask[row][valid])
        dice = []
        for c in mask[row][valid].unique().tolist():
            p, t = F.softmax(logits[row], dim=0)[c][valid], (mask[row][valid] == c).float()
            dice.append(2 * (p * t).sum() / (p.sum() + t.sum()))
        expected += 1 - torch.stack(dice).mean()
    loss, count = task.loss(_Fixed(logits), batch)
    torch.testing.assert_close(loss, expected)
    assert count == 2


@pytest.mark.parametrize("name", ["classify", "segment"])
def test_padding_and_ignored_masks_carry_exactly_nothing(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, name)
    task.cfg.task.class_weights = None
    model = _Fixed(torch.randn(3, 3, SIZE, SIZE) if name == "segment" else torch.randn(3, 3))
    mask = torch.randint(0, 3, (3, SIZE, SIZE))
    mask[1] = 255
    batch = {
        "image": torch.zeros(3, 3, SIZE, SIZE),
        "label": torch.tensor([0, 1, 2]),
        "mask": mask,
        "weight": torch.tensor([1.0, float(name == "segment"), 0.0]),
    }
    loss, count = task.loss(model, batch)
    loss.backward()
    assert count == task.count(batch) == 1
    assert model.logits.grad is not None
    assert model.logits.grad[0].abs().sum() > 0
    assert model.logits.grad[1:].abs().sum() == 0
    nothing, none = task.loss(
        model, _rows(batch, slice(1, 2)) if name == "segment" else {**batch, "weight": torch.zeros(3)}
    )
    assert nothing == 0
    assert none == 0


# ---- Own folders, end to end -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures whose classes can be told: bright squares on dark noise, in odd sizes, modes mixed, one file corrupt."""
    generator = np.random.default_rng(0)
    roots = {name: tmp_path_factory.mktemp(name) for name in ("segment", "classify")}
    for folder in ("images", "masks"):
        (roots["segment"] / "own" / folder).mkdir(parents=True)
    for i in range(12):
        height, width = 17 + 3 * i, 41 - 2 * i
        pixels = generator.integers(0, 90, (height, width, 4), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        y, x = generator.integers(0, height - 9), generator.integers(0, width - 9)
        mask[y : y + 9, x : x + 9] = 1
        pixels[mask > 0] = 230
        pixels[..., 3] = 255
        picture, ids = Image.fromarray(pixels), Image.fromarray(mask)
        ids.putpalette(bytes(range(256)) * 3)
        picture = picture if i % 3 == 0 else picture.convert("L" if i % 3 == 1 else "RGB")
        picture.save(roots["segment"] / "own" / "images" / f"p{i}.png")
        ids.save(roots["segment"] / "own" / "masks" / f"p{i}.png")
        side = roots["classify"] / "own" / ("dark", "light")[i % 2]
        side.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0] // 2 + 120 * (i % 2)).save(side / f"p{i}.png")
    for broken in (roots["segment"] / "own/images/broken.png", roots["classify"] / "own/dark/broken.png"):
        broken.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    Image.new("L", (20, 20)).save(roots["segment"] / "own/masks/broken.png")
    return roots


Trained = tuple[Any, nn.Module, Loader, Config]


@pytest.fixture(scope="module", params=["segment", "classify"])
def trained(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Trained]:
    """A few steps on an own folder."""
    name, said = request.param, []
    cfg = _cfg(folders[name], name)
    prepared = data.prepare(cfg, said.append)
    assert prepared.info["bad_rows"] == 1
    train_sets, _ = data.open_datasets(prepared, cfg)
    task = (Segment if name == "segment" else Classify)(cfg, prepared)
    model = models.initialise(task.build_model(), seed=0)
    order = Order([len(train_sets[0])], [1.0], 4, 0)
    loader = Loader(
        train_sets, order, rank=0, world_size=1, micro_batch_size=3, seed=0, device="cpu", workers=1
    )  # 4 = 3 + 1 + 2 of padding
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        batches = loader.micro_batches(step)
        count = sum(int(task.count(batch)) for batch in batches)
        assert count == 4
        for batch in batches:
            with models.keyed(model, batch, 0):
                loss, _ = task.loss(model, batch)
                (loss / count).backward()
            losses.append(loss.item() / count)
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    yield task, model, loader, cfg
    loader.close()


def test_own_folders_train_and_predict_what_was_evaluated(trained: Trained, tmp_path: Path) -> None:
    task, model, loader, cfg = trained
    whole = task.evaluate(model, loader.eval_batches(task.held_out), lambda tensor: tensor)
    assert set(whole) == set(task.directions)
    assert whole[task.objective] > 0.6
    assert model.training, "the mode is as it was"

    # The same by ranks that share the pictures, as `reduce` sees them: the sum over two ranks.
    parts: list[list[Tensor]] = []
    for rank in range(2):
        seen: list[Tensor] = []
        half = Loader([], loader.order, rank=rank, world_size=2, micro_batch_size=5, seed=0, device="cpu", workers=1)
        task.evaluate(model, half.eval_batches(task.held_out), lambda tensor, seen=seen: seen.append(tensor) or tensor)
        half.close()
        parts.append(seen)
    sums = iter([a + b for a, b in zip(*parts)])
    again = task.evaluate(model, [], lambda tensor: next(sums))
    assert again[task.objective] == whole[task.objective]
    assert again["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)

    # And from files, as `gearshift predict` does: the held-out pictures give the figure of the evaluation.
    assert task.predict_files(model, None, tmp_path / "held", print)[task.objective] == whole[task.objective]
    said: list[str] = []
    metrics = task.predict_files(model, Path(cfg.data.path or ""), tmp_path / "all", said.append)
    assert task.objective in metrics
    assert len(said) == 1
    assert "broken.png" in said[0]
    task.sample(model, 40, tmp_path / "samples")
    task.sample(model, 40, None)
    if isinstance(task, Segment):
        _check_masks(task, metrics, Path(cfg.data.path or ""), tmp_path)
    else:
        _check_classes(task, metrics, tmp_path)


def _check_masks(task: Segment, metrics: dict[str, float], own: Path, tmp_path: Path) -> None:
    right = total = 0
    for path in sorted((tmp_path / "all" / "masks").glob("*.png")):
        found, truth = Image.open(path), Image.open(own / "masks" / path.name)
        assert found.mode == "P"
        assert found.size == truth.size, "whole pictures, of any size"
        right += int((np.asarray(found) == np.asarray(truth)).sum())
        total += truth.width * truth.height
        assert Image.open(tmp_path / "all" / "overlays" / path.name).size == truth.size
    assert right / total == pytest.approx(metrics["eval_accuracy"])
    (strip,) = (tmp_path / "samples").glob("*.png")
    assert Image.open(strip).width % 3 == 0


def _check_classes(task: Classify, metrics: dict[str, float], tmp_path: Path) -> None:
    rows = list(csv.DictReader((tmp_path / "all" / "classes.csv").open()))
    assert len(rows) == 12
    assert np.mean([row["class"] == row["true"] for row in rows]) == pytest.approx(metrics["eval_accuracy"])
    assert all(float(row["dark"]) + float(row["light"]) == pytest.approx(1, abs=1e-5) for row in rows)
    assert task.confusion is not None
    assert task.confusion.sum() == 12
    assert (tmp_path / "samples" / "confusion.csv").exists()


def test_predict_answers_for_rows_that_are_no_padding(trained: Trained) -> None:
    task, model, loader, _ = trained
    *_, last = loader.eval_batches(task.held_out)
    answers = task.predict(model, last)
    assert len(answers) == int(last["weight"].sum())
    shape = (SIZE, SIZE) if isinstance(task, Segment) else (2,)
    assert all(answer.shape == shape for answer in answers)


def test_pictures_without_labels_are_predicted_and_not_judged(trained: Trained, tmp_path: Path) -> None:
    task, model, _, _ = trained
    Image.new("RGBA", (70, 9)).save(tmp_path / "one.png")
    assert task.predict_files(model, tmp_path / "one.png", tmp_path / "to", print) == {}
    if isinstance(task, Segment):
        (tmp_path / "strange").mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / "strange" / "a.png")
        Image.new("L", (20, 20), 7).save(tmp_path / "strange" / "a_mask.png")
        said: list[str] = []
        assert task.predict_files(model, tmp_path / "strange", tmp_path / "to", said.append) == {}
        assert "[7], which this model does not know" in said[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture that can be read"):
        task.predict_files(model, tmp_path / "empty", tmp_path / "to", print)


# ---- Any number of ranks ---------------------------------------------------------------------------------------------

RECIPE = [
    "hardware=cpu", "train.precision=fp32", "optim.lr=1e-3", "optim.warmup_steps=10", "optim.weight_decay=0.1",
    "optim.schedule=constant", "train.max_steps=50", "train.global_batch_size=8", "model.dropout=0.1", "tracker=none",
    "eval.every=null", "eval.max_samples=100", "eval.samples=1", "checkpoint.keep_best=false",
]  # fmt: skip
EXPERIMENTS = {
    "segment_digits": ["data.image_size=32", "data.augment=[flip,shift,scale,color]", "model.channels=32",
                       "model.num_layers=2", "optim.clip=0.8"],
    "classify_digits": ["data.augment=[shift,color]", "model.channels=64", "model.num_layers=3", "optim.clip=5"],
}  # fmt: skip
DRAWN_BY_RANK = """
import os
from train.data import views
original = views.uniforms
views.uniforms = lambda key, count: original((key[0] + int(os.environ["RANK"]), *key[1:]), count)
"""


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("curves")

    def job(experiment: str, name: str, micro: int, strategy: str) -> list[str]:
        own = [f"strategy={strategy}", f"strategy.micro_batch_size={micro}", f"run.root={root}"]
        return [f"experiment={experiment}", *RECIPE, *EXPERIMENTS[experiment], *own, f"run.name={experiment}-{name}"]

    alone = [job(e, f"alone-{micro}", micro, "single") for e in EXPERIMENTS for micro in (2, 4)]
    ranks.run_jobs(1, alone)
    for world_size in (2, 3):
        ranks.run_jobs(world_size, [job(e, str(world_size), 2, "ddp") for e in EXPERIMENTS])
    ranks.run_jobs(2, [job("classify_digits", "broken", 2, "ddp")], setup=DRAWN_BY_RANK)
    return root


def _apart(root: Path, run: str, reference: str) -> tuple[float, float]:
    """Largest relative difference over the steps, of losses and of gradient norms."""
    pairs = list(zip(ranks.metrics(root / run), ranks.metrics(root / reference), strict=True))
    return tuple(max(abs(a[key] - b[key]) / b[key] for a, b in pairs) for key in ("loss", "grad_norm"))  # type: ignore[return-value]


@pytest.mark.ranks
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_one_two_and_three_ranks_have_one_curve(curves: Path, experiment: str) -> None:
    reference = ranks.metrics(curves / f"{experiment}-alone-2")
    assert np.mean([row["loss"] for row in reference[-10:]]) < 0.7 * reference[0]["loss"]
    clip = float(EXPERIMENTS[experiment][-1].partition("=")[2])
    assert {row["grad_norm"] > clip for row in reference} == {True, False}, "it bites in some steps only"
    floor, _ = _apart(curves, f"{experiment}-alone-4", f"{experiment}-alone-2")
    assert floor < 1e-6
    for world_size in (2, 3):
        loss, norm = _apart(curves, f"{experiment}-{world_size}", f"{experiment}-alone-2")
        assert ranks.result(curves / f"{experiment}-{world_size}")["engine"]["world_size"] == world_size
        assert loss < 1e-5
        assert norm < 1e-3
        assert equivalence.masters(curves / f"{experiment}-{world_size}", curves / f"{experiment}-alone-2") < 1e-5
        last = ranks.metrics(curves / f"{experiment}-{world_size}")[-1]
        for key in (key for key in last if key.startswith("eval_")):
            assert last[key] == pytest.approx(reference[-1][key], rel=1e-3)


@pytest.mark.ranks
def test_augmentation_drawn_by_rank_is_another_curve(curves: Path) -> None:
    assert _apart(curves, "classify_digits-broken", "classify_digits-alone-2")[0] > 1e-3
