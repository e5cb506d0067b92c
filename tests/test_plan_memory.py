"""What a rank holds: names that add up, sharding that divides, levers that pull the way they should."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.plan import constants, memory, timing
from train.plan.memory import Layout
from train.plan.shapes import Line, Op, Param, Phase, Section, Trace

MIB = 2**20


def made(
    *, depth: int = 8, width: int = 1024, frozen: bool = False, precision: str = "bf16", mode: str = "weights"
) -> Trace:
    """A trace written by hand: an embedding, equal blocks, a head."""
    square = Param(width * width, width, not frozen, True)
    adapter = (Param(width * 16, 16, True, True),) if frozen else ()
    kept, tokens = Line(0, 8 * MIB), 256
    product = Op(
        "matmul",
        4,
        Line(0, 2.0 * tokens * width * width),
        Line(2 * width * width, 4.0 * tokens * width),
        (Line(0, tokens), Line(width), Line(width)),
        half=True,
        again=3,
    )
    pointwise = Op("memory", 6, Line(), Line(0, 2.0 * MIB), again=6)
    forward = Phase(
        kept, (Line(0, 10 * MIB),), (Line(0, 10 * MIB),), Line(0, 4 * MIB), Line(0, 3 * MIB), (product, pointwise)
    )
    backward = Phase(
        Line(0, -8 * MIB), (Line(0, 3 * MIB),), (Line(MIB, 3 * MIB),), Line(), Line(0, 6 * MIB), (product, product)
    )
    block = Section(
        "block",
        depth,
        (square,) * 4 + adapter,
        forward,
        backward,
        Line(0, MIB),
        8 * width * width if mode == "autocast" else 0,
    )
    ends = [
        Section(
            name,
            1,
            (Param(8192 * width, 8192, not frozen, name == "after"),),
            Phase(Line(0, MIB), (Line(0, 9 * MIB),), (Line(0, 9 * MIB),)),
            Phase(Line(0, -MIB), (Line(0, 2 * MIB),), (Line(0, 2 * MIB),)),
        )
        for name in ("before", "after")
    ]
    return Trace((ends[0], block, ends[1]), precision, mode, tokens)


ALL = [Layout(s, r, 2) for s, r in (("single", 1), ("ddp", 4), ("fsdp2", 4), ("zero1", 4), ("zero2", 4), ("zero3", 4))]


@pytest.mark.parametrize("layout", ALL, ids=lambda x: x.strategy)
def test_every_term_has_a_name_and_is_part_of_the_sum(layout: Layout) -> None:
    held = memory.holds(made(), layout)
    assert held.allocated == pytest.approx(sum(held.terms.values()))
    assert all(value > 0 and name == name.strip() for name, value in held.terms.items())
    assert held.moment


def test_model_state_is_sixteen_bytes_and_its_shards() -> None:
    trace, n = made(mode="autocast"), made().numel()
    single = memory.holds(trace, Layout(accumulation=2)).terms
    assert single["weights"] + single["optimizer state"] + single["gradients"] == pytest.approx(16 * n)
    shard = memory.holds(made(), Layout("fsdp2", 8, 1, 2)).terms
    assert shard["weights"] + shard["optimizer state"] + shard["gradients"] == pytest.approx(16 * n / 8)
    third = memory.holds(made(), Layout("zero3", 8, 1, 2, persistence_threshold=0)).terms
    assert third["weights"] + third["fp32 masters"] + third["optimizer state"] == pytest.approx(14 * n / 8)
    second = memory.holds(made(), Layout("zero2", 8, 1, 2)).terms
    assert second["weights"] == pytest.approx(2 * n)  # whole, in 16 bits
    assert second["optimizer state"] == pytest.approx(n)


def test_four_bits_and_eight_bits() -> None:
    trace = made(frozen=True)
    plain, packed = (memory.holds(trace, Layout(quantised=q)).terms["weights"] for q in (False, True))
    matrices = 8 * 4 * 1024**2
    assert plain - packed == pytest.approx(matrices * (2 - constants.NF4_BYTES))
    eight = memory.holds(made(), Layout(optimizer="adamw_8bit")).terms["optimizer state"]
    assert eight == pytest.approx(made().numel() * (2 + 8 / constants.BLOCK_8BIT))
    assert "optimizer state" not in memory.holds(made(), Layout(optimizer="sgd", momentum=False)).terms


def test_offload_moves_state_to_the_host() -> None:
    here = memory.holds(made(), Layout("zero2", 2, 1))
    there = memory.holds(made(), Layout("zero2", 2, 1, offload="cpu"))
    gone = here.terms["optimizer state"] + here.terms["fp32 masters"]
    assert here.allocated - there.allocated >= gone * 0.99
    assert there.host["optimizer state"] + there.host["fp32 masters"] == pytest.approx(gone)
    assert not here.host


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 64), st.sampled_from(["none", "blocks"]))
def test_levers_pull_the_way_they_should(layout: Layout, micro: int, compiled: str) -> None:
    from dataclasses import replace

    trace = made()
    base = memory.holds(trace, replace(layout, micro_batch=micro, compile=compiled)).allocated
    assert memory.holds(trace, replace(layout, micro_batch=micro + 1, compile=compiled)).allocated >= base
    assert memory.holds(trace, replace(layout, micro_batch=micro, compile=compiled, checkpointing=1)).allocated <= base
    assert memory.holds(trace, replace(layout, micro_batch=micro, compile="blocks")).allocated <= base * (1 + 1e-9)
    if layout.ranks > 1 and layout.strategy != "ddp":
        more = memory.holds(
            trace, replace(layout, micro_batch=micro, compile=compiled, ranks=2 * layout.ranks)
        ).allocated
        assert more <= base * (1 + 1e-9)


def test_allocator_and_contexts_are_no_tensors_and_only_on_a_gpu() -> None:
    assert memory.device_overhead(1e9, 1, "cpu") == {}
    alone, many = memory.device_overhead(1e9, 1, "cuda"), memory.device_overhead(1e9, 8, "cuda")
    assert sum(alone.values()) < sum(many.values())
    assert "allocator rounding" in memory.holds(made(), Layout(micro_batch=64)).terms
    assert "allocator rounding" not in memory.holds(made(), Layout(micro_batch=64, device="cpu")).terms


# ---- Time ------------------------------------------------------------------------------------------------------------


def machine(ranks: int = 1, **options: float) -> timing.Machine:
    card = constants.CARDS["a100-80gb"]
    return timing.Machine(
        card,
        devices=min(8, ranks),
        nodes=max(1, ranks // 8),
        memory_bytes=card.memory_gib * 2**30,
        intra=300e9,
        inter=200e9,
        **options,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ALL, ids=lambda x: x.strategy)
def test_the_parts_of_a_step_add_up(layout: Layout) -> None:
    step = timing.step_time(made(), layout, machine(layout.ranks))
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert step.seconds > 0
    assert all(value >= 0 for value in step.parts.values())
    peak = constants.CARDS["a100-80gb"].half_tflops * 1e12
    assert step.flops / step.seconds < peak  # nothing is faster than the data sheet


def test_recomputation_costs_what_is_repeated() -> None:
    plain, again = (timing.step_time(made(), Layout(micro_batch=8, checkpointing=c), machine()).parts for c in (0, 1))
    assert plain["recomputation"] == 0
    products = timing.computing(
        made(), 8, 0, "none", False, constants.CARDS["a100-80gb"], "cuda", constants.SPEED
    ).parts
    assert 0 < again["recomputation"] < products["matrix products"] / 3 + products["memory traffic"]


def test_a_slow_link_is_waited_for_and_a_fast_one_is_not() -> None:
    from dataclasses import replace

    layout = Layout("fsdp2", 16, 1)
    slow = timing.step_time(made(), layout, replace(machine(16), inter=1e9)).parts
    fast = timing.step_time(
        made(), layout, replace(machine(16), inter=1e15, intra=1e15), replace(constants.SPEED, rank_s=0.0)
    ).parts
    assert slow["communication not hidden"] > 0
    assert "communication not hidden" not in fast


def test_accumulation_repeats_computation_not_the_update() -> None:
    one, four = (timing.step_time(made(), Layout(accumulation=a), machine()) for a in (1, 4))
    assert four.parts["matrix products"] == pytest.approx(4 * one.parts["matrix products"])
    assert four.parts["optimizer"] == one.parts["optimizer"]
    assert four.flops == 4 * one.flops


def test_short_sides_cost_more_per_flop() -> None:
    def per_flop(side: int) -> float:
        op = Op("matmul", 1, Line(2.0 * side**3), Line(), (Line(side),) * 3, half=True)
        phase = Phase(ops=(op,))
        seconds = timing._phase(
            made().sections[1], phase, 1, False, False, constants.CARDS["a100-80gb"], "cuda", constants.SPEED
        )
        return (seconds["matrix products"] - constants.SPEED.kernel_s) / op.flops(1)

    assert per_flop(256) > 1.5 * per_flop(8192)
    assert math.isclose(per_flop(2**20), per_flop(2**19), rel_tol=1e-2)
