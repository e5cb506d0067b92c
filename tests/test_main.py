"""The training script itself: the laws on one experiment, stopping and going on, and the result it leaves.

Full matrices are `make equivalence`; here is a covering sample, small enough for the gate. Losses, sizes and engines are
read from the run directories of real runs (`tests/ranks.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from train import rundir

pytestmark = pytest.mark.timeout(1200)  # the first test of the file waits for all of its runs

SMALL = [
    "experiment=lm_stdlib", "hardware=cpu", "train.precision=fp32", "optim.lr=1e-3", "train.max_steps=20",
    "train.global_batch_size=8", "model.num_layers=2", "data.seq_len=64", "strategy.micro_batch_size=2",
    "strategy.persistence_threshold=0", "eval.max_samples=7", "eval.samples=0", "eval.every=null", "tracker=none",
    "log.every=5",
]  # fmt: skip


def differences(run: Path, reference: Path) -> tuple[float, float]:
    """Largest relative difference of losses and of gradient norms, step by step."""
    a, b = ranks.metrics(run), ranks.metrics(reference)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    loss = max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a, b))
    norm = max(abs(x["grad_norm"] - y["grad_norm"]) / y["grad_norm"] for x, y in zip(a, b))
    return loss, norm


EXACT = [
    "numerics=exact",
    "train.max_steps=6",
    "train.global_batch_size=6",
    "model.dropout=0.1",
    "strategy.micro_batch_size=null",
]
EMA = ["optim.ema=0.9", "eval.every=5", "train.max_steps=10"]
HALVED = """
from train import strategy
original = strategy.Strategy.__init__
def halved(self, *arguments):
    original(self, *arguments)
    self.scale = 1.0
strategy.Strategy.__init__ = halved
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, with one launch per number of ranks: most of the time goes into imports."""
    root = tmp_path_factory.mktemp("runs")

    def job(name: str, *overrides: str) -> list[str]:
        return [*SMALL, f"run.root={root}", f"run.name={name}", *overrides]

    ranks.run_jobs(1, [
        job("single-1"), job("exact-1", *EXACT), job("stopped", "run.stop_at=7"), job("ema-1", *EMA),
        job("patient", *EMA, "eval.every=2", "eval.patience=1", "optim.lr=0.5"),
    ])  # fmt: skip
    kept = ranks.result(root / "stopped")
    (root / "stopped-first.json").write_text(json.dumps(kept))
    ranks.run_jobs(2, [
        job("ema-2", *EMA, "strategy=fsdp2"),
        job("ddp-2", "strategy=ddp"), job("zero2-2", "strategy=zero2"), job("fsdp2-2", "strategy=fsdp2"), job("exact-2", *EXACT),
        job("moved", "strategy=zero2", "run.stop_at=7"), job("moved", "strategy=fsdp2", "run.stop_at=12"),
    ])  # fmt: skip
    ranks.run_jobs(3, [
        job("ddp-3", "strategy=ddp"), job("zero3-3", "strategy=zero3"), job("exact-3", *EXACT),
        job("moved", "strategy=zero3", "run.stop_at=16"),
    ])  # fmt: skip
    ranks.run_jobs(4, [job("ddp-4", "strategy=ddp")])
    ranks.run_jobs(1, [job("moved", "strategy=single"), job("stopped", "run.stop_at=7"), job("stopped")])
    ranks.run_jobs(2, [job("halved", "strategy=ddp")], setup=HALVED)
    return root


@pytest.fixture(scope="module")
def reference(root: Path) -> Path:
    return root / "single-1"


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ddp-2", "zero2-2", "fsdp2-2", "ddp-3", "zero3-3", "ddp-4"])
def test_any_number_of_ranks_gives_the_curve_of_one(name: str, root: Path, reference: Path) -> None:
    result = ranks.result(root / name)
    loss, norm = differences(root / name, reference)
    assert loss < 1e-5
    assert norm < 1e-3
    assert result["eval"]["eval_loss"] == pytest.approx(
        ranks.result(reference)["eval"]["eval_loss"], rel=1e-6
    )  # 7 samples
    strategy, world_size = name.split("-")
    assert (result["engine"]["strategy"], result["engine"]["world_size"]) == (strategy, int(world_size))
    assert result["math_hash"] == ranks.result(reference)["math_hash"]


@pytest.mark.ranks
def test_a_wrong_gradient_scale_is_seen(root: Path, reference: Path) -> None:
    """Negative control: clip and Adam hide a constant factor from the losses, so the gradient norm has to show it."""
    assert differences(root / "halved", reference)[1] > 0.1


@pytest.mark.ranks
def test_exact_numerics_gives_the_same_bits_on_any_number_of_ranks(root: Path) -> None:
    found = set()
    for world_size in (1, 2, 3):
        run = root / f"exact-{world_size}"
        assert ranks.result(run)["engine"]["world_size"] == world_size
        found.add((ranks.result(run)["state_hash"], *(row["loss_hex"] for row in ranks.metrics(run))))
    assert len(found) == 1


def test_a_stopped_run_goes_on_bit_for_bit(root: Path, reference: Path) -> None:
    first, last = json.loads((root / "stopped-first.json").read_text()), ranks.result(root / "stopped")
    assert (first["status"], first["reason"], first["steps"]) == ("stopped", "run.stop_at=7", 7)
    assert (last["status"], last["attempt"], last["samples"]) == ("finished", 3, 160)
    ends = [e["step"] for e in rundir.read_jsonl(root / "stopped" / "events.jsonl") if e["kind"] in ("stop", "end")]
    assert ends == [7, 7, 20]  # a stop that is due already costs no step
    assert last["state_hash"] == ranks.result(reference)["state_hash"]
    assert [r["loss_hex"] for r in ranks.metrics(root / "stopped")] == [r["loss_hex"] for r in ranks.metrics(reference)]


@pytest.mark.ranks
def test_the_moving_average_is_evaluated_and_saved_under_any_strategy(root: Path) -> None:
    from train import checkpoint

    one, two = root / "ema-1", root / "ema-2"
    assert ranks.result(two)["engine"]["strategy"] == "fsdp2"
    losses = [[row["eval_loss"] for row in ranks.metrics(run) if "eval_loss" in row] for run in (one, two)]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    averages, masters = (checkpoint.read_masters(one, "last", averaged=kind) for kind in (True, False))
    assert any(not averages[name].equal(masters[name]) for name in masters)
    shared = checkpoint.read_masters(two, "last")
    assert all(averages[name].allclose(shared[name], atol=1e-6) for name in averages)


def test_patience_ends_a_run_that_gets_no_better(root: Path) -> None:
    result = ranks.result(root / "patient")
    assert (result["status"], result["reason"]) == ("finished", "eval.patience=1")
    assert result["steps"] < 10


@pytest.mark.pulse
@pytest.mark.ranks
@pytest.mark.parametrize(
    "launcher", ["accelerate launch --multi_gpu --num_processes 2 -m", "torchrun --nproc-per-node 2 -m"]
)
def test_both_launchers_start_the_script_on_two_ranks(launcher: str, root: Path, reference: Path) -> None:
    name = launcher.split()[0]
    program, *words = launcher.split()
    command = [
        str(Path(sys.executable).parent / program),
        *words,
        "train",
        *SMALL,
        f"run.root={root}",
        f"run.name={name}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ranks.ROOT, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    loss, norm = differences(root / name, reference)
    assert loss < 1e-5
    assert norm < 1e-3
    assert (ranks.result(root / name)["engine"]["strategy"], ranks.result(root / name)["engine"]["world_size"]) == (
        "ddp",
        2,
    )


@pytest.mark.ranks
def test_a_run_moves_between_strategies(root: Path, reference: Path) -> None:
    loss, norm = differences(root / "moved", reference)
    assert loss < 1e-5
    assert norm < 1e-3
    assert ranks.result(root / "moved")["status"] == "finished"


def test_a_finished_run_shows_its_result_again_without_torch(reference: Path) -> None:
    code = "import sys, runpy; sys.argv = ['train', '--result', *sys.argv[1:]]\n"
    code += "try: runpy.run_module('train', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, *SMALL, f"run.root={reference.parent}", f"run.name={reference.name}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ranks.ROOT, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert done.stderr.strip().endswith("False")


def test_the_ledger_accounts_for_every_sample(root: Path) -> None:
    from train import ledger

    for name in (
        "single-1",
        "ddp-3",
        "moved",
        "stopped",
    ):  # one attempt, ranks that do not divide, four sizes, three stops
        proof = ledger.verify(rundir.RunDir(root / name))
        assert (proof["problems"], proof["positions"]) == ([], 160)
