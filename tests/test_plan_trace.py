"""A trace of a step: against the profiler, against itself at another depth, and against arithmetic on paper."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.allocator import peak_bytes
from train.plan import memory
from train.plan.memory import Layout
from train.plan.shapes import Line, Trace
from train.plan.trace import _hull, trace

ROWS, VOCAB = 64, 512


def llama(layers: int = 6, hidden: int = 128, ffn: int = 352, heads: int = 4) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=ROWS,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.model.layers)  # type: ignore[union-attr, arg-type]


def batch(size: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.zeros(size, ROWS, dtype=torch.long)}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["tokens"], use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten())


def traced(build=llama, **options) -> Trace:
    options = {"precision": "fp32", "mode": "autocast", "tokens": ROWS, "device": "cpu", **options}
    return trace(build, blocks, batch, loss, **options)


@pytest.fixture(scope="module")
def short() -> Trace:
    return traced()


@pytest.fixture(scope="module")
def whole() -> Trace:
    return traced(whole=True)


def test_a_deep_stack_is_its_first_middle_and_last_block(short: Trace, whole: Trace) -> None:
    assert [s.repeat for s in short.sections] == [1, 1, 4, 1, 1]
    assert [s.repeat for s in whole.sections] == [1] * 8
    for micro in (1, 2, 7):
        assert short.flops(micro) == pytest.approx(whole.flops(micro))
        a, b = (sum(s.forward.kept(micro) for s in t.each()) for t in (short, whole))
        assert a == pytest.approx(b)
        for checkpointing in (0, 1, 2):
            layout = Layout(micro_batch=micro, checkpointing=checkpointing, device="cpu")
            assert memory.holds(short, layout).allocated == pytest.approx(
                memory.holds(whole, layout).allocated, rel=1e-4
            )
    assert short.numel() == whole.numel() == sum(p.numel() for p in llama().parameters())


def test_unequal_blocks_do_not_stand_for_each_other() -> None:
    def uneven() -> nn.Module:
        model = llama()
        model.model.layers[2].mlp.gate_proj.bias = nn.Parameter(torch.zeros(352))  # type: ignore[union-attr, index]
        return model

    assert [s.repeat for s in traced(uneven).sections] == [1] * 8


def profiled_peak(micro: int) -> float:
    """Bytes at the peak of two AdamW steps of the same model, from the allocator's events."""

    def train() -> None:
        model = llama(layers=3, hidden=256, ffn=704)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        for _ in range(2):
            value = loss(model, batch(micro))
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return float(peak_bytes(train))


@pytest.mark.parametrize("micro", [4, 32])
def test_memory_is_what_the_allocator_hands_out(micro: int) -> None:
    made = traced(lambda: llama(layers=3, hidden=256, ffn=704))
    predicted = memory.holds(made, Layout(micro_batch=micro, foreach=True, device="cpu")).allocated
    measured = profiled_peak(micro)
    assert predicted == pytest.approx(measured, rel=0.005)
    wrong = memory.holds(made, Layout(micro_batch=micro + 1, foreach=False, device="cpu")).allocated
    assert wrong != pytest.approx(measured, rel=0.005)  # the bound can fail


def test_flops_are_six_per_weight_and_attention(short: Trace) -> None:
    weights = sum(p.numel for s in short.each() for p in s.params if p.matrix)
    attention = 12 * 6 * 128 * ROWS  # 4 forward and 8 backward per layer, width and earlier token
    # The first block's input is an embedding, whose gradient is wanted too: nothing is left out.
    assert short.flops(3) == pytest.approx(3 * ROWS * (6 * weights + attention))
    assert short.flops(3, causal=True) < short.flops(3)
    assert short.flops(3, backward=False) == pytest.approx(short.flops(3) / 3)


def test_recomputation_stops_at_the_last_saved_tensor(short: Trace) -> None:
    block = short.sections[2].forward
    products = [op for op in block.ops if op.kind == "matmul"]
    assert sum(op.count for op in products) == 7  # q k v o gate up down
    assert sum(op.again for op in products) == 6  # the last product's result is saved nowhere


def test_sixteen_bits_halve_what_is_kept_and_autocast_copies_weights() -> None:
    full, cast, auto = traced(), traced(precision="bf16", mode="weights"), traced(precision="bf16", device="cuda")
    kept = [sum(s.forward.kept.each for s in t.each()) for t in (full, cast, auto)]
    assert kept[1] < kept[2] < kept[0]
    linear = sum(p.numel for s in auto.each() for p in s.params if p.matrix)
    assert sum(s.repeat * s.copies for s in auto.sections) == 2 * linear
    assert sum(s.copies for s in cast.sections) == sum(s.copies for s in full.sections) == 0


def test_compiled_blocks_keep_less(short: Trace) -> None:
    block = short.sections[2]
    assert block.forward.compiled.each < block.forward.kept.each
    assert block.forward.fused.each < sum(op.count * op.bytes.each for op in block.forward.ops if op.kind == "memory")


def test_a_model_that_runs_twice_computes_twice_and_weighs_once(whole: Trace) -> None:
    def twice(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss(model, batch) + loss(model, batch)

    double = trace(
        llama, blocks, batch, twice, precision="fp32", mode="autocast", tokens=ROWS, device="cpu", whole=True
    )
    assert double.flops(2) == pytest.approx(2 * whole.flops(2))
    assert double.numel() == whole.numel()
    assert sum(s.forward.kept(4) for s in double.each()) > 1.9 * sum(s.forward.kept(4) for s in whole.each())


def test_a_trace_is_plain_data(short: Trace) -> None:
    text = json.dumps(short.to_dict())
    again = Trace.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    layout = Layout(micro_batch=3, strategy="fsdp2", ranks=4)
    assert memory.holds(again, layout).allocated == pytest.approx(memory.holds(short, layout).allocated, rel=1e-6)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Trace.from_dict({"sections": [[1, 2]], "precision": "fp32", "mode": "autocast", "tokens": 1})


@given(
    st.lists(st.tuples(st.integers(-1000, 1000), st.integers(-50, 50)), min_size=1, max_size=12), st.integers(1, 300)
)
def test_the_hull_holds_the_highest_line_everywhere(pairs: list[tuple[int, int]], micro: int) -> None:
    lines = [Line(float(a), float(b)) for a, b in pairs]
    assert max(x(micro) for x in _hull(lines)) == pytest.approx(max(x(micro) for x in lines))


def test_seven_billion_parameters_in_seconds_and_nothing_allocated() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    made = traced(lambda: llama(layers=32, hidden=4096, ffn=11008, heads=32), precision="bf16", mode="weights")
    assert time.perf_counter() - begun < 60  # seconds, not hours: benchmarks say how many
    assert 6.4e9 < made.numel() < 6.6e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
