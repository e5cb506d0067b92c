"""Networks for pictures: no sample sees another, foreign ones are made to stand alone, pixels are as they expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train import models
from train.config import Config
from train.data import images
from train.models import ModelError, vision

INFO = {"num_classes": 5, "channels": 3, "vocab_size": 0}


def _cfg(name: str, task: str, **settings: Any) -> Config:
    cfg = Config()
    cfg.task.name, cfg.model.name, cfg.data.image_size = task, name, 16
    for key, value in {"channels": 8, "num_layers": 3, "hidden_size": 32, "num_heads": 4, **settings}.items():
        setattr(cfg.model, key, value)
    return cfg


def _model(name: str, task: str = "classify", **settings: Any) -> nn.Module:
    model = models.build(_cfg(name, task, **settings), INFO)
    assert all(parameter.is_meta for parameter in model.parameters())
    return models.initialise(model, seed=0)


def _batch(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(size, 3, 16, 16, generator=generator)
    return {"image": image, "sample": torch.arange(size) + 7, "epoch": torch.zeros(size, dtype=torch.int64)}


NETWORKS = [("unet", "segment"), ("convnet", "classify"), ("vit", "classify")]


@pytest.mark.parametrize(("name", "task"), NETWORKS)
def test_a_sample_gives_the_same_logits_alone_and_in_any_batch(name: str, task: str) -> None:
    model, batch = _model(name, task, dropout=0.3), _batch(4)
    with models.keyed(model, batch, seed=1), torch.no_grad():
        together = model(batch["image"])
        again = model(batch["image"])
    assert together.shape == ((4, 5, 16, 16) if task == "segment" else (4, 5))
    assert torch.equal(together, again), "the keys decide, no generator does"
    alone = []
    for row in range(4):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        with models.keyed(model, one, seed=1), torch.no_grad():
            alone.append(model(one["image"]))
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-5)
    with models.keyed(model, batch, seed=2), torch.no_grad():
        assert not torch.equal(model(batch["image"]), together), "dropout is on"
    assert models.blocks(model)


def test_batch_norm_would_see_other_samples() -> None:
    """The control of the test above: with one batch-wise layer it fails."""
    model, batch = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)), _batch(4)
    assert not torch.allclose(model(batch["image"])[:1], model(batch["image"][:1]), atol=1e-3)
    frozen = vision.stand_alone(model)
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    torch.testing.assert_close(frozen(batch["image"])[:1], frozen(batch["image"][:1]))
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())
    assert {name for name, _ in frozen.named_parameters()} == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (4, 5)), (nn.BatchNorm3d, (4, 5, 2, 2, 2))])
def test_batch_norm_of_any_dimension_stands_still(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    x, norm = torch.randn(shape), nn.Sequential(kind(5))
    assert not torch.allclose(norm(x)[:2], norm(x[:2]), atol=1e-3)
    frozen = vision.stand_alone(norm)
    torch.testing.assert_close(frozen(x)[:2], frozen(x[:2]))
    with pytest.raises(ModelError, match="without statistics"):
        vision.stand_alone(nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False)))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (5, 9)])
def test_the_unet_takes_any_size(height: int, width: int) -> None:
    model = _model("unet", "segment").eval()
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 5, height, width)


def test_positions_of_neighbours_are_alike() -> None:
    table = vision._sincos(8, 32)[0]
    near, far = (torch.dist(table[0], table[index]) for index in (1, 60))
    assert near < far
    assert torch.isfinite(vision._sincos(3, 30)).all()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of transformers as others publish them: weights, config, preprocessing."""
    import transformers as hf

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoints")
    resnet = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5, out_features=["stage2"]
    )
    segformer = hf.SegformerConfig(
        depths=[1, 1], hidden_sizes=[8, 8], num_encoder_blocks=2, decoder_hidden_size=8, num_attention_heads=[1, 1],
        patch_sizes=[3, 3], strides=[2, 2], sr_ratios=[1, 1], mlp_ratios=[2, 2], num_labels=7, drop_path_rate=0.5,
    )  # fmt: skip
    vit = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
        hidden_dropout_prob=0.2, num_labels=5,
    )  # fmt: skip
    made = {
        "resnet": hf.ResNetForImageClassification(resnet),
        "segformer": hf.SegformerForSemanticSegmentation(segformer),
        "vit": hf.ViTForImageClassification(vit),
    }
    for name, model in made.items():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
        model.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True})
        )
    return {name: root / name for name in made}


@pytest.mark.parametrize(("name", "task"), [("resnet", "classify"), ("segformer", "segment"), ("vit", "classify")])
def test_a_checkpoint_trains_like_our_own(checkpoints: dict[str, Path], name: str, task: str) -> None:
    import transformers as hf

    model = _model("pretrained", task, path=str(checkpoints[name]))
    batch = _batch(3)
    with models.keyed(model, batch, seed=1):
        together = model(batch["image"]).logits
        together.sum().backward()
    with models.keyed(model, {k: v[:1] for k, v in batch.items()}, seed=1):
        torch.testing.assert_close(model(batch["image"][:1]).logits, together[:1], rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None for name, p in model.named_parameters() if "mask_token" not in name)

    reference = hf.AutoModelForImageClassification if task == "classify" else hf.AutoModelForSemanticSegmentation
    other = reference.from_pretrained(checkpoints[name]).eval()
    same = {key: value for key, value in model.state_dict().items() if key in other.state_dict()}
    for key, value in same.items():
        if value.shape == other.state_dict()[key].shape:
            assert torch.equal(value, other.state_dict()[key]), f"{key} is read, and no forward moved it"
    if name != "segformer":
        torch.testing.assert_close(model.eval()(batch["image"]).logits, other(batch["image"]).logits)
    else:
        assert together.shape[1] == 5, "another number of classes gets a new head"


def test_what_no_logit_depends_on_is_named_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers as hf

    stages = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic", "embedding_size": 8}
    resnet = hf.ResNetConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"])
    small = {"auxiliary_channels": 8, "auxiliary_in_channels": 8, "hidden_size": 16}
    upernet = hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=resnet, **small))
    assert vision.idle(upernet, 3, 32), "the control: its second head gets no gradient"
    upernet.save_pretrained(tmp_path / "upernet")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    hf.Dinov2ForImageClassification(hf.Dinov2Config(**shape)).save_pretrained(tmp_path / "dinov2")
    for name, task, still in [("upernet", "segment", []), ("dinov2", "classify", ["dinov2.embeddings.mask_token"])]:
        model = _model("pretrained", task, path=str(tmp_path / name))
        model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == still
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == still
        assert all(name in caplog.text for name in still)


def test_a_size_that_the_checkpoint_does_not_take_is_refused(checkpoints: dict[str, Path]) -> None:
    cfg = _cfg("pretrained", "classify", path=str(checkpoints["vit"]))
    cfg.data.image_size = 20
    with pytest.raises(ModelError, match=r"data.image_size=20.*Set data.image_size=16"):
        models.build(cfg, INFO)


def test_a_kind_without_a_head_for_the_task_is_answered_with_those_that_have_one(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"a resnet cannot be had for task=segment.*segformer"):
        _model("pretrained", "segment", path=str(checkpoints["resnet"]))


def test_pixels_are_normalised_as_the_checkpoint_says(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    cfg = _cfg("pretrained", "classify", path=str(checkpoints["vit"]))
    assert images.normalisation(cfg, [0.5] * 3, [0.3] * 3) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    cfg.model.path = str(tmp_path)
    assert images.normalisation(cfg, [0.5] * 3, [0.5] * 3) == ([0.5] * 3, [0.5] * 3)

    run = {"info": {"channels": 1, "mean": [0.7], "std": [0.2], "classes": []}}
    (tmp_path / "data.json").write_text(json.dumps(run))
    assert images.checkpoint(cfg) == {"channels": 1, "mean": [0.7], "std": [0.2]}


def test_a_revision_in_the_name_counts_for_the_normalisation_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked, commit = [], "1" * 40
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))

    def download(name: str, file: str, *, revision: str) -> str:
        asked.append((name, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = images.checkpoint(_cfg("pretrained", "classify", path=f"some/vit@{commit}"))
    assert asked == [("some/vit", commit)]
    assert found == {"channels": 3, "mean": [0.1] * 3, "std": [0.2] * 3}
