"""Strategies: a gradient that is not finite on one rank, engines that are not what was asked, the tree of exact numerics.

That every strategy gives one curve is tested in `test_main.py` (a sample) and by `benchmarks/equivalence.py` (the matrix).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests import ranks
from train.strategy import exact

pytestmark = pytest.mark.timeout(1200)  # the first test of the file waits for all of its runs

SMALL = [
    "experiment=lm_stdlib", "hardware=cpu", "train.precision=fp32", "train.max_steps=6", "train.global_batch_size=4",
    "model.num_layers=1", "data.seq_len=32", "strategy.micro_batch_size=2", "strategy.persistence_threshold=0",
    "eval.max_samples=8", "eval.samples=0", "eval.every=null", "tracker=none", "log.every=2",
]  # fmt: skip
# In the third micro-batch of every run, and on one rank only, the loss and so the gradient are NaN.
POISON = """
import os
from train.tasks import causal_lm
original, calls = causal_lm.CausalLM.loss, {}
def loss(self, model, batch):
    total, count = original(self, model, batch)
    calls[id(self)] = calls.get(id(self), 0) + 1
    return (total * float("nan") if calls[id(self)] == 3 and os.environ["RANK"] == "1" else total), count
causal_lm.CausalLM.loss = loss
"""
# What `Accelerator(cpu=True)` does to a DeepSpeed plug-in: plain DDP, exit code 0, losses that look right.
IGNORED = """
import accelerate
original = accelerate.Accelerator.__init__
def ignored(self, *arguments, **options):
    original(self, *arguments, **{**options, "cpu": True})
accelerate.Accelerator.__init__ = ignored
"""
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str | None]]:
    """Two ranks of every strategy under both policies; name of the run -> (directory, how it ended)."""
    root = tmp_path_factory.mktemp("poisoned")
    names = [f"{s}-{p}" for s, p in itertools.product(STRATEGIES, ("stop", "skip"))] + ["ddp-skip-fused"]
    jobs = []
    for name in names:
        strategy, policy, *fused = name.split("-")
        more = ["strategy.fused_optimizer=true"] if fused else []
        jobs.append(
            [*SMALL, *more, f"strategy={strategy}", f"train.nonfinite={policy}", f"run.root={root}", f"run.name={name}"]
        )
    errors = ranks.run_jobs(2, jobs, setup=POISON, check=False)
    return {name: (root / name, error) for name, error in zip(names, errors)}


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_stop_before_the_update_that_is_not_finite(strategy: str, poisoned: dict) -> None:
    run, error = poisoned[f"{strategy}-stop"]
    assert "NonFinite" in error
    assert [row["step"] for row in ranks.metrics(run)] == [1, 2]
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*(f"{s}-skip" for s in STRATEGIES), "ddp-skip-fused"])
def test_all_ranks_skip_the_step_that_is_not_finite_and_go_on(name: str, poisoned: dict) -> None:
    run, error = poisoned[name]
    assert error is None
    rows = ranks.metrics(run)
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [3]
    after = [row["loss"] for row in rows if row["step"] > 3]
    reference = [row["loss"] for row in ranks.metrics(poisoned["ddp-skip"][0]) if row["step"] > 3]
    assert after == pytest.approx(reference, rel=1e-5)


@pytest.mark.ranks
def test_an_engine_that_was_not_asked_for_ends_the_run(tmp_path: Path) -> None:
    jobs = [[*SMALL, f"strategy={s}", f"run.root={tmp_path}", f"run.name={s}"] for s in ("zero1", "zero3")]
    errors = ranks.run_jobs(2, jobs, setup=IGNORED, check=False)
    assert all("asked zero" in error for error in errors)
    assert all(not (tmp_path / s / "metrics.jsonl").exists() for s in ("zero1", "zero3"))


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


def test_adding_in_rank_order_gives_other_bits() -> None:
    """Negative control: the tree is what makes the bits equal."""
    torch.manual_seed(0)
    leaves = [torch.randn(1000) * 10.0 ** (i % 3) for i in range(8)]
    by_rank = [sum(sum(leaves[8 * r // w : 8 * (r + 1) // w]) for r in range(w)) for w in (1, 2, 3, 4)]
    assert not all(torch.equal(by_rank[0], other) for other in by_rank[1:])
