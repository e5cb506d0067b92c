"""What a save costs the loop: how long it is blocked beside a blocking `torch.save`, and how much steps slow down meanwhile.

    python benchmarks/save.py            a minute on two cores that nothing else uses; writes benchmarks/results/save_DATE.md

480 MiB of fp32 state (masters and both moments of 42 M parameters). Blocked: `Checkpointer.save`, asynchronous, whose
buffers are warm, in turn with `torch.save` of the same tensors and an fsync; medians. The file that each leaves is read back
and compared. Sag: one thread multiplies matrices in steps of 20 ms, with and without a save under way, in turn.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import checkpoint, rundir  # noqa: E402
from train.config import CheckpointConfig  # noqa: E402
from train.rundir import RunDir  # noqa: E402
from train.strategy import Processes  # noqa: E402

MIB, ROUNDS = 480, 7
BLOCKED, SAG = 0.2, 1.05
HASHES = {"math_hash": "0" * 64, "exec_hash": "1" * 64}


class State:
    """What `Checkpointer` sees of a strategy: 14 matrices with their moments, all on this rank."""

    name, aliases = "single", {}

    def __init__(self) -> None:
        side = int((MIB * 2**20 / 4 / 3 / 14) ** 0.5)
        self.shapes = {f"layer{i}.weight": (side, side) for i in range(14)}
        kinds = ("master", "exp_avg", "exp_avg_sq")
        self.tensors = {(name, kind): torch.randn(side * side) for name in self.shapes for kind in kinds}

    def owned(self) -> Any:
        return ((name, kind, 0, tensor) for (name, kind), tensor in self.tensors.items())

    def changed_buffers(self) -> list[str]:
        return []


def blocking(state: State, path: Path) -> float:
    began = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state.tensors, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def step(a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.perf_counter()
    for _ in range(8):
        torch.mm(a, b)
    return time.perf_counter() - began


def main() -> int:
    torch.set_num_threads(1)
    state, procs = State(), Processes(0, 0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=ROOT) as directory:  # a disk, not a file system in memory
        run = RunDir(Path(directory) / "run").create()
        saver = checkpoint.Checkpointer(run, procs, state, CheckpointConfig(keep=1), hashes=HASHES, lock=None, attempt=1,
                                        saved_step=None)  # type: ignore[arg-type]  # fmt: skip
        ours, theirs, quiet, beside = [], [], [], []
        a, b = torch.randn(384, 384), torch.randn(384, 384)
        for number in range(1, ROUNDS + 2):
            theirs.append(blocking(state, Path(directory) / "plain.pt"))
            quiet += [step(a, b) for _ in range(40)]
            began = time.perf_counter()
            saver.save(number, {"best_step": None})
            ours.append(time.perf_counter() - began)
            while saver._thread is not None and saver._thread.is_alive():
                beside.append(step(a, b))
            saver.wait()
            saver.report("stop")
        assert rundir.committed(run) == [ROUNDS + 1]
        reader = checkpoint.Reader(run.checkpoint(ROUNDS + 1))
        reader.verify()
        plain = torch.load(Path(directory) / "plain.pt", weights_only=True)
        for (name, kind), tensor in state.tensors.items():
            assert (reader.read(name, kind, 0, tensor.numel()) == tensor.numpy()).all()
            assert torch.equal(plain[name, kind], tensor)
        size = sum(file.stat().st_size for file in run.checkpoint(ROUNDS + 1).iterdir()) / 2**20
    found = SimpleNamespace(blocked=statistics.median(ours[1:]), plain=statistics.median(theirs[1:]),
                            quiet=statistics.median(quiet), beside=statistics.median(beside))  # fmt: skip
    blocked, sag = found.blocked / found.plain, found.beside / found.quiet
    where = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    text = (
        f"# What a save costs the loop, {datetime.date.today()}\n\n"
        f"`python benchmarks/save.py`, {where}; {size:.0f} MiB, {ROUNDS} rounds, medians.\n\n"
        f"- The loop is blocked for {found.blocked * 1e3:.0f} ms; `torch.save` and fsync of the same take "
        f"{found.plain * 1e3:.0f} ms: {blocked:.2f} x (limit {BLOCKED} x){'' if blocked <= BLOCKED else ', **missed**'}.\n"
        f"- A step takes {found.quiet * 1e3:.2f} ms, and {found.beside * 1e3:.2f} ms while a save is written "
        f"({len(beside)} steps): {sag:.3f} x (limit {SAG} x){'' if sag <= SAG else ', **missed**'}.\n"
    )
    print(text)
    (ROOT / "benchmarks" / "results" / f"save_{datetime.date.today()}.md").write_text(text)
    return 0 if blocked <= BLOCKED and sag <= SAG else 1


if __name__ == "__main__":
    sys.exit(main())
