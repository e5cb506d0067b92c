"""Strategies: one curve under each of them, ways to be wrong that have to be seen, the same bits, the memory levers.

What runs is a sample of `benchmarks/equivalence.py`, which has the whole matrix; what breaks it is `tests/sabotage.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import equivalence
from benchmarks.equivalence import Cell
from tests import ranks, sabotage
from train import checkpoint, config, strategy
from train.strategy import exact

pytestmark = pytest.mark.timeout(1200)  # the first test of the file waits for all of its runs

EXACT = [
    *(Cell(task, "ddp", n, "fp32", numerics="exact") for task, n in (("lm", 3), ("segment", 2))),
    Cell("lm", "ddp", 3, "fp32", numerics="exact", way=sabotage.RANK_ORDER),
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, dict[str, Any]]:
    """The sample of the matrix, every control and some exact runs, beside their references."""
    root = tmp_path_factory.mktemp("cells")
    return equivalence.run([*equivalence.SAMPLE, *equivalence.CONTROLS, *EXACT], root)


@pytest.mark.ranks
@pytest.mark.parametrize("cell", equivalence.SAMPLE, ids=lambda c: c.name)
def test_the_curve_is_that_of_one_process(cell: Cell, cells: dict) -> None:
    assert not equivalence.problems(cell, cells[cell])
    assert not equivalence.problems(cell.reference, cells[cell.reference])  # it learns, and its clip bites now and then


def test_the_sample_has_every_strategy_with_adapters() -> None:
    strategies = {c.strategy for c in equivalence.SAMPLE if c.task == "lora"}
    assert strategies == set(equivalence.STRATEGIES) - {"zero3+nvme"}


@pytest.mark.ranks
@pytest.mark.parametrize("way", sabotage.CURVES)
def test_a_wrong_curve_is_seen(way: str, cells: dict) -> None:
    cell = next(c for c in equivalence.CONTROLS if c.way == way)
    assert "error" not in cells[cell], cells[cell]
    assert equivalence.problems(cell, cells[cell])


@pytest.mark.ranks
@pytest.mark.parametrize("way", sabotage.STARTS)
def test_what_was_not_asked_for_ends_the_run_at_its_start(way: str, cells: dict) -> None:
    cell = next(c for c in equivalence.CONTROLS if c.way == way)
    assert sabotage.STARTS[way][2] in cells[cell]["error"]


def test_ranks_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes were started, and each has found itself only."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(strategy.Mismatch, match="started 2 processes, but the group has 1"):
            strategy.start(config.compose(["experiment=lm_stdlib", "hardware=cpu", "strategy=ddp"]))
    finally:
        dist.destroy_process_group()


def test_what_accelerate_would_have_changed_is_named_and_does_not_win(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a saved `accelerate config` for ZeRO-2 with offloading exports, beside what every launch does."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "RANK", "WORLD_SIZE"))}
    always = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_USE_CPU": "False",
              "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}  # fmt: skip
    agrees = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    hostile = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
               "ACCELERATE_GRADIENT_CLIPPING": "0.3", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "mine.json",
               "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_USE_FSDP": "true"}  # fmt: skip
    cfg = config.compose(["experiment=lm_stdlib", "hardware=cpu", "strategy=zero3"])
    for exported, named in (({**always, **agrees}, {}), ({**always, **agrees, **hostile}, hostile)):
        monkeypatch.setattr(os, "environ", {**own, **exported})
        caplog.clear()
        strategy._neutralise_environment(cfg, "zero3")
        assert os.environ == own
        told = " ".join(r.getMessage() for r in caplog.records)
        assert {key for key in exported if f"{key}=" in told} == set(named)
        assert ("strategy=zero3" in told) == bool(named)


# ---- The same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize("cell", EXACT, ids=lambda c: c.name)
def test_exact_numerics_have_one_hash(cell: Cell, cells: dict) -> None:
    same = cells[cell]["state_hash"] == cells[cell.reference]["state_hash"]
    assert same == (not cell.way)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 13])
def test_the_tree_gives_the_same_bits_for_every_number_of_ranks(size: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(5) * 10.0**i for i in range(size)]

    def summed(world_size: int) -> torch.Tensor:
        whole = exact.Tree()
        for rank in range(world_size):
            low, high = size * rank // world_size, size * (rank + 1) // world_size
            own = exact.Tree()
            for i in range(low, high):
                own.add(i, 1, [leaves[i].clone()])
            assert [(start, n) for start, n, _ in own.stack] == exact.nodes(low, high)
            for start, n, values in own.stack:
                whole.add(start, n, [v.clone() for v in values])
        return whole.total()[0]

    expected = summed(1)
    assert all(torch.equal(summed(world_size), expected) for world_size in range(2, size + 1))


# ---- Gradients that are not finite, and levers -----------------------------------------------------------------------

SMALL = [
    "experiment=lm_stdlib", "hardware=cpu", "train.precision=fp32", "train.max_steps=6", "train.global_batch_size=4",
    "model.num_layers=2", "model.hidden_size=64", "model.num_heads=2", "data.seq_len=32",
    "strategy.persistence_threshold=0", "eval.max_samples=8", "eval.samples=0", "eval.every=null", "tracker=none",
    "log.every=2", "optim.lr=1e-3", "optim.warmup_steps=0",
]  # fmt: skip
POISONED = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2+cpu", "zero3+cpu"]
BF16 = ["fsdp2", "zero1", "zero2", "zero3"]  # where gradients are found and judged by other code than in fp32
OFFLOADING = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
LEVERS = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3+cpu"]
FIVE = ["ddp", "fsdp2", "zero2", "zero3"]
STORAGES = ["uint8", "bf16", "fp32"]


def where(name: str) -> list[str]:
    engine, _, offload = name.partition("+")
    return [f"strategy={engine}", f"strategy.offload={offload or 'none'}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str | None]]:
    """(root, name of a run -> how it ended): a launch of one rank, one of two, one of five."""
    root = tmp_path_factory.mktemp("runs")
    base = equivalence.base_model(root)
    small = [*SMALL, f"run.root={root}"]
    lora = [o for o in equivalence.TASKS["lora"] if o != "peft=lora"]
    lora += [*equivalence.RECIPE, "train.precision=fp32", "train.max_steps=6", small[-1]]
    lora += [f"model.path={base}", f"data.tokenizer={base}", "peft=qlora", "peft.alpha=64"]
    eight = [*small, "optim=adamw_8bit"]

    one = {f"single-{p}--nan": [*small, "strategy=single", f"train.nonfinite={p}"] for p in ("stop", "skip")}
    one |= {"single": [*small, "strategy=single"], "single-eight": eight, "single-qlora": lora}
    one["moved"] = [*eight, "run.stop_at=3"]
    odd = [*small, "train.global_batch_size=8", "strategy.micro_batch_size=1", "data=chat", "data.path=stdlib"]
    odd += ["data.glob=null", "data.tokenizer=bytes", "data.seq_len=256"]  # packed rows: uneven counts of tokens
    one["single-odd"] = odd
    two = {f"{s}-{p}--nan": [*small, *where(s), f"train.nonfinite={p}"] for s in POISONED for p in ("stop", "skip")}
    two |= {f"{s}-bf16-stop--nan": [*small, f"strategy={s}", "train.precision=bf16"] for s in BF16}
    two["ddp-skip-fused--nan"] = [*small, "strategy=ddp", "train.nonfinite=skip", "strategy.fused_optimizer=true"]
    two |= {f"{s}-offloading": [*small, f"strategy={s}", "strategy.activation_offload=true"] for s in OFFLOADING}
    two["fsdp2-both"] = [*two["fsdp2-offloading"], "strategy.activation_checkpointing=1"]
    two |= {"ddp-eight": [*eight, "strategy=ddp"], "moved": [*eight, "strategy=ddp"]}
    levers = ["strategy.chunked_loss=true", "strategy.activation_checkpointing=2", "optim.ema=0.9"]
    two |= {f"{s}-levers": [*small, *where(s), *levers] for s in LEVERS}
    two["ddp-qlora"] = [*lora, "strategy=ddp"]
    two |= {f"fsdp2-qlora-{t}": [*lora, "strategy=fsdp2", f"peft.quant_storage={t}"] for t in STORAGES}
    found: dict[str, str | None] = {}
    five = {f"{s}-five": [*odd, *where(s)] for s in FIVE}  # shares of 2, 2, 2, 1 and 1 samples
    for world_size, jobs in ((1, one), (2, two), (5, five)):
        named = [[*job, f"run.name={name.replace('+', '-')}"] for name, job in jobs.items()]
        found |= zip(jobs, ranks.run_jobs(world_size, named, setup=sabotage.SETUP, check=False), strict=True)
    return root, found


def ended_well(runs: tuple, name: str) -> Path:
    root, errors = runs
    assert errors[name] is None, errors[name]
    return root / name.replace("+", "-")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in ranks.metrics(run)]


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["single", *POISONED, *(f"{s}-bf16" for s in BF16)])
def test_all_ranks_stop_before_the_update_that_is_not_finite(name: str, runs: tuple) -> None:
    root, errors = runs
    assert "NonFinite" in errors[f"{name}-stop--nan"]
    run = root / f"{name}-stop--nan".replace("+", "-")
    assert [row["step"] for row in ranks.metrics(run)] == [1, 2]
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["single-skip", *(f"{s}-skip" for s in POISONED), "ddp-skip-fused"])
def test_all_ranks_skip_the_step_that_is_not_finite_and_go_on(name: str, runs: tuple) -> None:
    rows = ranks.metrics(ended_well(runs, f"{name}--nan"))
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [3]
    reference = losses(ended_well(runs, "single-skip--nan"))
    assert [row["loss"] for row in rows if row["step"] > 3] == pytest.approx(reference[3:], rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*(f"{s}-offloading" for s in OFFLOADING), "fsdp2-both"])
def test_activations_in_host_memory_leave_the_curve_alone(name: str, runs: tuple) -> None:
    assert losses(ended_well(runs, name)) == pytest.approx(losses(ended_well(runs, "single")), rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("name", LEVERS)
def test_the_loss_in_chunks_and_every_second_block_recomputed_leave_the_curve_alone(name: str, runs: tuple) -> None:
    run = ended_well(runs, f"{name}-levers")
    assert losses(run) == pytest.approx(losses(ended_well(runs, "single")), rel=1e-5)
    assert ranks.result(run)["engine"]["strategy"] == name.partition("+")[0]


@pytest.mark.ranks
@pytest.mark.parametrize("name", FIVE)
def test_five_ranks_give_the_curve_of_one(name: str, runs: tuple) -> None:
    run, alone = ended_well(runs, f"{name}-five"), ended_well(runs, "single-odd")
    engine = ranks.result(run)["engine"]
    assert (engine["strategy"], engine["world_size"], engine["seen_samples"]) == (name, 5, 8)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    norms = [row["grad_norm"] for row in ranks.metrics(alone)]
    assert [row["grad_norm"] for row in ranks.metrics(run)] == pytest.approx(norms, rel=1e-3)


def test_what_a_block_saves_goes_to_the_host_and_its_weights_do_not() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    block(x).sum().backward()
    plain = [p.grad for p in block.parameters()]
    block.zero_grad()
    strategy.offload_activations(block)
    y = block(x)
    packed, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        packed += [getattr(node, name).data for name in dir(node) if name.startswith("_raw_saved_")]
        nodes += [next_node for next_node, _ in node.next_functions if next_node is not None]
    moved, kept = [p for p in packed if isinstance(p, tuple)], [p for p in packed if isinstance(p, torch.Tensor)]
    weights = {p.data_ptr() for p in block.parameters()}
    assert {t.data_ptr() for t in kept} == {block[0].weight.data_ptr(), block[2].weight.data_ptr()}
    assert len(moved) == 3  # what both layers and the GELU got
    assert not weights & {host.data_ptr() for _, host in moved}
    y.sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, block.parameters(), strict=True))


def test_levers_that_work_by_block_are_refused_where_there_is_none() -> None:
    cfg = config.compose(
        ["experiment=lm_stdlib", "hardware=cpu", "strategy=single", "strategy.activation_offload=true"]
    )
    engine = strategy.build(cfg, strategy.Processes(0, 0, 1, torch.device("cpu")), "fp32")
    with pytest.raises(config.ConfigError, match="no repeated blocks"):
        engine.prepare(nn.Linear(2, 2), lambda name: None, [], lambda named: torch.optim.SGD(named.values()))


# ---- Optimizer state in 8 bits, weights in 4 -------------------------------------------------------------------------


@pytest.mark.ranks
def test_adamw_in_8_bits_moves_as_fp32(runs: tuple) -> None:
    pytest.importorskip("bitsandbytes")
    alone, wide = ended_well(runs, "single-eight"), ended_well(runs, "ddp-eight")
    assert ranks.result(alone)["engine"]["optimizer_class"] == "AdamW8bit"
    assert losses(wide) == pytest.approx(losses(alone), rel=1e-3)  # rounding moves a number from one code to the next
    exact_moments = losses(ended_well(runs, "single"))
    assert losses(alone) == pytest.approx(exact_moments, rel=5e-3)
    assert losses(alone)[1:] != exact_moments[1:]
    moved = ended_well(runs, "moved")  # begun by one rank, ended by two
    assert ranks.result(moved)["attempt"] == 2
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-3)
    assert checkpoint.read_masters(moved, "last")


def test_moments_in_8_bits_are_read_and_written() -> None:
    optimizers = pytest.importorskip("bitsandbytes.optim")
    from train.strategy import eight_bit

    large, small = (nn.Parameter(torch.randn(n, 64)) for n in (100, 10))  # below 4,096 elements nothing is in 8 bits
    optimizer = optimizers.AdamW8bit([large, small])
    assert not any(m.any() for p in (large, small) for m in eight_bit.moments(optimizer, p).values())
    for p in (large, small):
        for kind, value in (("exp_avg", torch.randn(p.numel())), ("exp_avg_sq", torch.rand(p.numel()))):
            eight_bit.store(optimizer, p, kind, value)
            got = eight_bit.moments(optimizer, p)[kind]
            assert got.shape == p.shape
            error = (got.view(-1) - value).norm() / value.norm()
            assert error == 0 if p is small else 0 < error < 0.02
    assert optimizer.state[large]["state1"].dtype == torch.uint8


@pytest.mark.ranks
def test_weights_in_4_bits_are_sharded_to_half_a_rank(runs: tuple) -> None:
    pytest.importorskip("bitsandbytes")
    single, whole = (ranks.result(ended_well(runs, name))["engine"] for name in ("single-qlora", "ddp-qlora"))
    assert single["four_bit_bytes"] == whole["four_bit_bytes"] == whole["four_bit_unsharded_bytes"] > 0
    reference = losses(ended_well(runs, "single-qlora"))
    assert losses(ended_well(runs, "ddp-qlora")) == pytest.approx(reference, rel=1e-5)
    for storage in STORAGES:
        run = ended_well(runs, f"fsdp2-qlora-{storage}")
        engine = ranks.result(run)["engine"]
        assert engine["four_bit_unsharded_bytes"] == whole["four_bit_bytes"]
        assert engine["four_bit_bytes"] == whole["four_bit_bytes"] / 2
        assert losses(run) == pytest.approx(reference, rel=1e-5)


# ---- On a card -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_tier_caps_a_bigger_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an 8 GB card has can be allocated, and no more, though this card has more."""
    if torch.cuda.mem_get_info()[1] < 12 * 2**30:
        pytest.skip("needs a card with more than 8 GB")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")})
    cfg = config.compose(["experiment=lm_stdlib", "hardware=gpu_8gb", "strategy=single"])
    assert cfg.hardware.memory_gib is not None
    procs = strategy.start(cfg)
    torch.empty(int((cfg.hardware.memory_gib - 1) * 2**30), dtype=torch.uint8, device=procs.device)
    torch.cuda.empty_cache()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(int((cfg.hardware.memory_gib + 1) * 2**30), dtype=torch.uint8, device=procs.device)
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_one_card_gives_one_curve_in_bf16(engine: str, tmp_path: Path) -> None:
    card = [*SMALL, "hardware=auto", "hardware.device=cuda", "train.precision=bf16", f"run.root={tmp_path}"]
    jobs = [[*card, f"strategy={s}", f"run.name={s}"] for s in dict.fromkeys(("single", engine))]
    ranks.run_jobs(1, jobs)
    assert losses(tmp_path / engine) == pytest.approx(losses(tmp_path / "single"), rel=1e-2)
