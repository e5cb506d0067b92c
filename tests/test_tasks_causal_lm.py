"""`train/tasks/causal_lm.py`: a loss that is a sum, packed rows like unpacked ones, chunks, bits per byte, samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.allocator import peak_bytes
from train import models
from train.config import Config
from train.data import Prepared
from train.data.tokenizer import Tokenizer, locate, make
from train.models import ModelError
from train.tasks import TASKS
from train.tasks.causal_lm import CausalLM, chunked_cross_entropy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg, directory = Config(), tmp_path_factory.mktemp("tokenizer")
    cfg.data.tokenizer = "bytes"
    make(locate(cfg, print), directory, lambda: iter(()), 0, cfg)
    return directory


def task(
    tokenizer: Path,
    name: str = "llama",
    *,
    chunked: bool = False,
    tie: bool = False,
    path: str | None = None,
    kind: str = "text",
    **info: Any,
) -> tuple[CausalLM, nn.Module]:
    cfg = Config()
    cfg.model.path, cfg.data.kind = path, kind
    cfg.model.name, cfg.model.hidden_size, cfg.model.num_layers, cfg.model.tie_embeddings = name, 32, 2, tie
    cfg.data.seq_len, cfg.strategy.chunked_loss, cfg.eval.sample_tokens = 24, chunked, 12
    prepared = Prepared("text", tokenizer, {}, {"vocab_size": 260, "tokenizer": str(tokenizer), **info})
    made = TASKS["causal_lm"](cfg, prepared)
    assert isinstance(made, CausalLM)
    return made, models.initialise(made.build_model(), 0)


def batch(rows: int = 4, length: int = 24, ignored: float = 0.3) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 260, (rows, length + 1), generator=source)
    labels = ids[:, 1:].where(torch.rand(rows, length, generator=source) >= ignored, -100)
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels, "weight": torch.ones(rows)}


def total(x: Tensor) -> Tensor:
    """Sums over ranks, of one rank."""
    return x


@pytest.mark.parametrize("chunked", [False, True])
def test_the_loss_is_a_sum_over_targets(tokenizer: Path, chunked: bool) -> None:
    made, model = task(tokenizer, chunked=chunked)
    data = batch()
    loss, count = made.loss(model, data)
    assert count == made.count(data) == (data["labels"] >= 0).sum()
    with torch.no_grad():
        log_probabilities = model(data["input_ids"]).logits.double().log_softmax(-1)
    rows, places = (data["labels"] >= 0).nonzero(as_tuple=True)
    expected = -log_probabilities[rows, places, data["labels"][rows, places]].sum()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parts = [made.loss(model, {k: v[i : i + 1] for k, v in data.items()})[0].item() for i in range(4)]
    assert sum(parts) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_no_target_is_a_finite_zero_with_zero_gradients(tokenizer: Path, chunked: bool) -> None:
    made, model = task(tokenizer, chunked=chunked)
    loss, count = made.loss(model, batch(ignored=1.1))
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---- Packed rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "Gemma2"])
def test_attention_never_crosses_documents(tokenizer: Path, tmp_path: Path, name: str) -> None:
    path = _checkpoint(name, tmp_path) if name == "Gemma2" else None
    made, model = task(tokenizer, name, path=path)
    lengths, alone = [7, 11, 4], []
    documents = [batch(1, n, ignored=0.0) for n in lengths]
    for document in documents:
        alone.append(made.loss(model, document)[0].item())
    padding = 24 - sum(lengths)
    packed = {
        "input_ids": torch.cat([*(d["input_ids"] for d in documents), torch.zeros(1, padding, dtype=torch.int64)], 1),
        "labels": torch.cat([*(d["labels"] for d in documents), torch.full((1, padding), -100)], 1),
        "position_ids": torch.cat([torch.arange(n) for n in (*lengths, padding)])[None],
        "document": torch.cat([torch.full((n,), i) for i, n in enumerate((*lengths, padding))])[None].int(),
    }
    loss, count = made.loss(model, packed)
    loss.backward()
    assert count == sum(lengths)
    assert loss.item() == pytest.approx(sum(alone), rel=1e-6)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    crossing = made.loss(model, {k: v for k, v in packed.items() if k not in ("document", "position_ids")})[0].item()
    assert abs(crossing - loss.item()) > 1e-4 * loss.item()  # the control: what a forgotten mask would give
    if path is not None:
        assert model.config._attn_implementation == "eager"
        made._additive = False  # the control: the mask that fused attention takes
        assert abs(made.loss(model, packed)[0].item() - loss.item()) > 1e-4 * loss.item()


def _checkpoint(name: str, directory: Path) -> str:
    """A tiny random model of transformers, as others publish them."""
    import transformers

    shapes = {
        "Gemma2": {"head_dim": 8, "intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": None},
        "Lfm2": {"intermediate_size": 32, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        "Mamba": {"state_size": 4},
        "Bloom": {"n_head": 2, "n_layer": 2},
    }
    common = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**common, **shapes[name])
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("name", ["Lfm2", "Mamba", "Bloom"])
def test_a_model_that_no_mask_keeps_apart_takes_no_packed_rows(tokenizer: Path, tmp_path: Path, name: str) -> None:
    path = _checkpoint(name, tmp_path)
    with pytest.raises(ModelError, match="would see each other"):
        task(tokenizer, path=path, kind="chat")
    task(tokenizer, path=path, kind="text")


# ---- The loss in chunks ----------------------------------------------------------------------------------------------


def gradients(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if rows == 0:
        logits = (h @ w.T).float().flatten(0, -2)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    else:
        loss = chunked_cross_entropy(h, w, labels, rows)
    (loss * 0.37).backward()  # as the script scales it
    assert h.grad is not None
    assert w.grad is not None
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("rows", [None, 1, 7, 1000])
def test_chunks_have_the_loss_and_gradients_of_cross_entropy(rows: int | None) -> None:
    source = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 20, 48, generator=source), torch.randn(517, 48, generator=source) * 0.3
    labels = torch.randint(0, 517, (3, 20), generator=source)
    labels[0, :9] = -100
    exact = gradients(hidden.double(), weight.double(), labels, 0)
    for chunked, plain in zip(gradients(hidden, weight, labels, rows), exact):
        assert (chunked - plain).norm() <= 1e-5 * plain.norm()
        assert (chunked - 1.1 * plain).norm() > 1e-5 * plain.norm()


def test_chunks_under_autocast_are_as_near_as_plain_autocast() -> None:
    source = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 48, generator=source), torch.randn(517, 48, generator=source) * 0.3
    labels = torch.randint(0, 517, (64,), generator=source)
    exact = gradients(hidden.double(), weight.double(), labels, 0)
    with torch.autocast("cpu", torch.bfloat16):
        plain, chunked = gradients(hidden, weight, labels, 0), gradients(hidden, weight, labels, 16)
    for mine, usual, right in zip(chunked, plain, exact):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() <= 1.5 * (usual - right).norm() + 1e-4 * right.norm()


@pytest.mark.parametrize(("name", "tie"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_a_model_trains_the_same_with_chunks(tokenizer: Path, name: str, tie: bool) -> None:
    found = []
    for chunked in (False, True):
        made, model = task(tokenizer, name, chunked=chunked, tie=tie)
        loss, _ = made.loss(model, batch())
        (loss / 50).backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
    (plain, expected), (loss, got) = found
    assert loss == pytest.approx(plain, rel=1e-6)
    assert expected.keys() == got.keys()
    for parameter, gradient in expected.items():
        assert (got[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, parameter


def test_the_head_is_a_head_again_outside_the_loss(tokenizer: Path) -> None:
    made, model = task(tokenizer, chunked=True)
    made.loss(model, batch())
    assert model(batch()["input_ids"]).logits.shape == (4, 24, 320)


def test_chunks_never_hold_all_logits() -> None:
    """Peak of the tensors alive, beyond the gradient of the weight, against the plain loss."""
    tokens, vocab, width = 1024, 8192, 64
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width)
    labels = torch.randint(0, vocab, (tokens,))
    gradient = vocab * width * 4
    peaks = {rows: peak_bytes(lambda r=rows: gradients(hidden, weight, labels, r)) - gradient for rows in (0, None)}
    assert peaks[None] <= 0.2 * peaks[0]


def test_a_head_that_is_more_than_a_matrix_is_refused(tokenizer: Path) -> None:
    _, model = task(tokenizer)
    model.config.final_logit_softcapping = 30.0
    from train.tasks import causal_lm

    with pytest.raises(ModelError, match="final_logit_softcapping"):
        causal_lm._chunk_head(model)


# ---- Evaluation and text ---------------------------------------------------------------------------------------------


def test_evaluation_is_per_target_and_per_byte(tokenizer: Path) -> None:
    made, model = task(tokenizer, val_targets=500, val_bytes=1250)
    data = [batch(4), batch(4, ignored=0.9), batch(4, ignored=1.1)]
    sums = [made.loss(model, b) for b in data]
    metrics = made.evaluate(model, data, total)
    mean = sum(loss.item() for loss, _ in sums) / sum(count.item() for _, count in sums)
    assert metrics["eval_loss"] == pytest.approx(mean, rel=1e-6)
    assert metrics["eval_bpb"] == pytest.approx(mean / math.log(2) * 500 / 1250, rel=1e-6)
    assert metrics.keys() == made.directions.keys()
    assert model.training
    others = torch.tensor([10.0, 5.0], dtype=torch.float64)  # what another rank reports is in the mean
    count = sum(count.item() for _, count in sums)
    both = made.evaluate(model, data, lambda mine: mine + others)
    assert both["eval_loss"] == pytest.approx((mean * count + 10) / (count + 5), rel=1e-6)
    assert "eval_bpb" not in task(tokenizer)[0].evaluate(model, data, total)


def test_samples_are_a_function_of_seed_and_step(tokenizer: Path, tmp_path: Path) -> None:
    made, model = task(tokenizer)
    calls: list[torch.Size] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    made.cfg.eval.samples = 2
    written = {}
    for name, step in (("a", 5), ("b", 5), ("c", 6)):
        made.sample(model, step, tmp_path / name)
        written[name] = [(tmp_path / name / f"sample-{i}.txt").read_bytes() for i in range(2)]
    assert written["a"] == written["b"] != written["c"]
    assert written["a"][0] != written["a"][1]
    assert all(text.startswith(b"def ") for text in written["a"])
    assert len(calls) == 3 * 12
    assert len(set(calls)) == 1  # one shape, for a compiled model
    made.sample(model, 7, None)  # a rank that writes nothing makes the same forwards
    assert len(calls) == 4 * 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    assert model.training


def test_predictions_are_the_most_likely_continuation(tokenizer: Path) -> None:
    made, model = task(tokenizer)
    prompts = made.encode(["ab", "import o"])
    assert prompts["length"].tolist() == [3, 9]
    speller = Tokenizer(tokenizer)
    assert prompts["input_ids"][0].tolist() == [speller.separator, *b"ab", 0, 0, 0, 0, 0, 0]
    new = made.generate(model, prompts, temperature=0.0)
    assert new.shape == (2, 12)
    with torch.no_grad():
        for row, length in enumerate([3, 9]):
            seen = prompts["input_ids"][row, :length].tolist()
            for token in new[row].tolist():
                assert model.eval()(torch.tensor([seen])).logits[0, -1, :260].argmax() == token
                seen.append(token)
    texts = made.predict(model, {**prompts, "weight": torch.tensor([1.0, 0.0])})
    assert len(texts) == 1
    assert isinstance(texts[0], str)


def test_a_row_that_outgrows_the_window_slides(tokenizer: Path) -> None:
    made, model = task(tokenizer)
    made.cfg.eval.sample_tokens = 40
    assert made.generate(model, made.encode(["x" * 30]), temperature=0.0).shape == (1, 40)


def test_a_continuation_ends_where_the_model_ends_it(tokenizer: Path) -> None:
    made, _ = task(tokenizer)
    assert made._decode([*b"return x", made._tokenizer.eos, *b"junk"]) == "return x"


def test_a_prompt_of_a_chat_model_is_a_turn_of_its_user(tokenizer: Path) -> None:
    made, _ = task(tokenizer)
    made.cfg.data.kind = "chat"
    ids = made.encode(["hi"])["input_ids"][0].tolist()
    assert Tokenizer(tokenizer).decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
