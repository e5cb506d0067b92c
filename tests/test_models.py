"""`train/models`: starting values by (seed, name), dropout by sample, the published sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train import models
from train.config import Config
from train.models import KeyedDropout, ModelError, keyed

INFO = {"vocab_size": 250}


def config(name: str = "llama", **fields: object) -> Config:
    cfg = Config()
    cfg.model.name, cfg.model.hidden_size, cfg.model.num_layers = name, 32, 2
    for field, value in fields.items():
        setattr(cfg.model, field, value)
    cfg.data.seq_len = 16
    return cfg


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        (
            "gpt2",
            {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 50257, "tie_embeddings": True},
            124_439_808,
        ),
        (
            "llama",
            {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
            6_738_415_616,
        ),
    ],
)
def test_published_sizes(name: str, fields: dict[str, object], count: int) -> None:
    cfg = config(name, **fields)
    cfg.data.seq_len = 1024
    model = models.build(cfg, INFO)
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())  # 27 GB that nobody allocated
    assert len(models.blocks(model)) == cfg.model.num_layers


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weight_for_weight_as_transformers(name: str) -> None:
    import transformers

    mine = models.initialise(models.build(config(name, tie_embeddings=name == "gpt2"), INFO), seed=3)
    theirs = {"llama": transformers.LlamaForCausalLM, "gpt2": transformers.GPT2LMHeadModel}[name](mine.config)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert digest(mine.named_buffers()) == digest(theirs.named_buffers())  # rotary frequencies survive the meta build
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)
    assert mine.config.vocab_size == 256  # rounded up
    tied = mine.get_output_embeddings().weight is mine.get_input_embeddings().weight
    assert tied == (name == "gpt2")


def test_statistics_of_the_starting_values_are_those_of_transformers() -> None:
    from transformers import GPT2LMHeadModel

    cfg = config("gpt2", hidden_size=128, num_heads=4, num_layers=8)
    mine = dict(models.initialise(models.build(cfg, INFO), seed=0).named_parameters())
    torch.manual_seed(0)
    theirs = dict(GPT2LMHeadModel(models.build(cfg, INFO).config).named_parameters())
    for name, parameter in theirs.items():
        assert mine[name].mean().item() == pytest.approx(parameter.mean().item(), abs=2e-3), name
        assert mine[name].std().item() == pytest.approx(parameter.std().item(), rel=0.1, abs=1e-9), name


def test_a_value_depends_on_seed_and_name_alone() -> None:
    small, large = models.build(config(), INFO), models.build(config(num_layers=3), INFO)
    values, more, other = (
        models.initial_values(small, 0),
        models.initial_values(large, 0),
        models.initial_values(small, 1),
    )
    names = [name for name, _ in small.named_parameters()]
    for name in reversed(names):  # in any order, in any model
        assert torch.equal(values(name), more(name))
    matrices = [name for name in names if values(name).dim() > 1]
    assert not any(torch.equal(values(name), other(name)) for name in matrices)
    assert len({values(name).flatten()[:8].sum().item() for name in matrices}) == len(matrices)
    model = models.initialise(small, 0)
    assert digest(model.named_parameters()) == digest((name, values(name)) for name in names)


def test_a_module_may_say_what_its_parameters_start_from() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.empty(3))

    class Known(Odd):
        def initial(self, name: str, generator: torch.Generator) -> Tensor:
            return torch.full((3,), 0.5)

    with pytest.raises(ModelError, match=r"gain.*initial\(name, generator\)"):
        models.initial_values(_on_meta(Odd), 0)("gain")
    assert models.initialise(_on_meta(Known), 0).gain.tolist() == [0.5, 0.5, 0.5]


def _on_meta(cls: type[nn.Module]) -> nn.Module:
    with models.parameters_on_meta():
        return cls()


def test_unknown_models_and_small_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model.name=lama: unknown.*llama"):
        models.build(config("lama"), INFO)
    with pytest.raises(ModelError, match="the tokenizer has 250 entries"):
        models.build(config(vocab_size=128), INFO)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


def batch(samples: list[int], epoch: int = 0) -> dict[str, Tensor]:
    return {"sample": torch.tensor(samples), "epoch": torch.full((len(samples),), epoch)}


def mask(
    module: nn.Module, samples: list[int], *, epoch: int = 0, seed: int = 0, shape: tuple[int, ...] = (8, 16)
) -> Tensor:
    with keyed(module, batch(samples, epoch), seed):
        return module(torch.ones(len(samples), *shape))


def named(p: float, **kwargs: int) -> nn.Module:
    """Two dropouts in a model that has been through the replacement."""
    model = nn.ModuleDict({"a": nn.Dropout(p), "b": KeyedDropout(p, **kwargs)})
    models._key_dropout(model)
    return model


def test_a_mask_is_that_of_the_sample_whatever_the_batch() -> None:
    drop = named(0.3)["a"]
    assert isinstance(drop, KeyedDropout)
    whole = mask(drop, [5, 6, 7, 2**40 + 5])
    for i, sample in enumerate([5, 6, 7, 2**40 + 5]):
        assert torch.equal(mask(drop, [sample])[0], whole[i])
        assert torch.equal(mask(drop, [9, sample])[1], whole[i])
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_a_mask_differs_by_sample_epoch_seed_and_module() -> None:
    model = named(0.5)
    a, b = model["a"], model["b"]
    base = mask(a, [5])
    for other in (mask(a, [6]), mask(a, [5 + 2**32]), mask(a, [5], epoch=1), mask(a, [5], seed=1), mask(b, [5])):
        agree = (other == base).float().mean().item()
        assert 0.3 < agree < 0.7  # independent, not only different


def test_the_rate_is_right_and_elements_are_independent() -> None:
    for p in (0.1, 0.5, 0.9):
        kept = mask(named(p)["a"], list(range(64)), shape=(4096,)) > 0
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / kept.numel()) ** 0.5)
        wanted = (1 - p) ** 2
        assert (kept[:, 1:] & kept[:, :-1]).float().mean().item() == pytest.approx(wanted, abs=5e-3)
        assert (kept[1:] & kept[:-1]).float().mean().item() == pytest.approx(wanted, abs=5e-3)
    assert mask(named(0.5)["a"], [1, 2], shape=(4096,)).mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_hash_is_pinned() -> None:
    """A resumed run, on any later version, goes on with the same masks."""
    drop = named(0.5)["a"]
    bits = (mask(drop, [3], shape=(32,)) > 0).int().flatten().tolist()
    assert "".join(map(str, bits)) == "10110111000101100011101011001101"


def test_channels_share_a_mask_with_axes() -> None:
    kept = mask(named(0.5, axes=2)["b"], [1, 2, 3], shape=(64, 4, 4)) > 0
    assert torch.equal(kept.all(dim=(2, 3)), kept.any(dim=(2, 3)))
    assert 0.3 < kept.float().mean().item() < 0.7


def test_dropout_needs_its_samples_and_evaluation_needs_none() -> None:
    drop = named(0.5)["a"]
    with pytest.raises(RuntimeError, match="outside `with keyed"):
        drop(torch.ones(2, 3))
    with keyed(drop, batch([1, 2, 3]), 0), pytest.raises(RuntimeError, match="samples come first"):
        drop(torch.ones(2, 3))
    assert torch.equal(drop.eval()(torch.ones(2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_with_dropout_gives_each_sample_its_gradient_under_recomputation(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model = models.initialise(models.build(config(name, dropout=0.2), INFO), 0)
    ids = torch.arange(4 * 16).view(4, 16) % 250

    def forward(x: Tensor) -> Tensor:
        return model(x).logits

    def gradient(rows: list[list[int]], *, recompute: bool = False, samples: int = 0) -> Tensor:
        model.zero_grad()
        for part in rows:
            with keyed(model, batch([samples + row for row in part]), 0):
                if recompute:
                    logits = checkpoint(forward, ids[part], use_reentrant=False, preserve_rng_state=False)
                else:
                    logits = forward(ids[part])
                logits.double().logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.manual_seed(0)
    whole = gradient([[0, 1, 2, 3]])
    torch.manual_seed(1)  # no generator is drawn from
    split = gradient([[3], [0, 2], [1]], recompute=True)
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    other = gradient([[0, 1, 2, 3]], samples=100)
    assert (whole - other).norm() > 0.01 * whole.norm()


def test_attention_dropout_is_refused(tmp_path: Path) -> None:
    model = models.initialise(models.build(config("gpt2"), INFO), 0)
    model.config.attn_pdrop = 0.1
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"attn_pdrop=0.1.*fused kernels"):
        models.build(config(path=str(tmp_path)), INFO)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("OPT", {"dropout": 0.1}),
        ("OPT", {"dropout": 0.0, "layerdrop": 0.1}),
        ("Bloom", {"hidden_dropout": 0.1}),
        ("BioGpt", {"hidden_dropout_prob": 0.1}),
        ("BioGpt", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.1}),
        ("Falcon", {"hidden_dropout": 0.1}),
    ],
)
def test_dropout_called_as_a_function_is_refused(tmp_path: Path, name: str, rates: dict[str, float]) -> None:
    import transformers

    common = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shapes = {"OPT": {"ffn_dim": 32, "word_embed_proj_dim": 32}, "BioGpt": {"intermediate_size": 32}}
    off = {"attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = getattr(transformers, f"{name}Config")(**common, **shapes.get(name, {}), **{**off, **rates})
    getattr(transformers, f"{name}ForCausalLM")(shape).save_pretrained(tmp_path)
    field, rate = list(rates.items())[-1]
    with pytest.raises(ModelError, match=rf"generator.*{field}={rate}"):
        models.build(config(path=str(tmp_path)), INFO)
    shape.update(dict.fromkeys(rates, 0.0))
    shape.save_pretrained(tmp_path)
    models.build(config(path=str(tmp_path)), INFO)  # the control: without a rate there is nothing to refuse
