"""The second law, measured: a checkpoint resumes under any strategy on any number of ranks.

    python benchmarks/resume.py                   everything: some minutes on two cores; writes the page of results
    python benchmarks/resume.py matrix --show     a part of it, to the terminal only

*matrix*: every layout (single, ddp, fsdp2, zero1, zero2, zero3, zero3+cpu, zero3+nvme on 1, 2 and 3 ranks)

- saves: after each save every rank reads the files and compares them with its live tensors, bit for bit;
- loads one reference checkpoint, which one process wrote: what is live then is compared with the files, bit for bit, and the
  weights that are computed with are compared with the masters, rounded to their precision; in bf16 too;
- goes on from there, and from the checkpoint of another layout: the next 20 losses within 1e-5 of the unbroken run of one
  process, gradient norms within 1e-3;
- goes on from its own: the next 20 losses bit for bit those of its own unbroken run.

*chains*: 1 -> 4 -> 2 -> 3 ranks, the ranks killed with SIGKILL in each link. Under `numerics=exact` (single, ddp) the final
state hash is that of the unbroken run; across ddp, fsdp2 and zero3 the losses stay within 1e-5. `verify` is clean in both.

A small language model, and LoRA over a small Llama; 26 steps of 6 samples.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import ranks, trained  # noqa: E402
from train import ledger, rundir  # noqa: E402
from train.rundir import RunDir  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
SAVED, STEPS = 6, 26
LOSS, NORM = 1e-5, 1e-3
BF16 = {"loss": 1e-2, "norm": 5e-2}
LAYOUTS = [
    ("single", 1),
    *((s, n) for n in (1, 2, 3) for s in ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3+cpu", "zero3+nvme")),
]
COMMON = [
    *("hardware=cpu", "tracker=none", "log.every=1", "eval.every=null", "eval.samples=0", "eval.max_samples=4"),
    *("train.global_batch_size=6", f"train.max_steps={STEPS}", "optim.lr=1e-3", "optim.warmup_steps=4"),
    *("data.seq_len=48", "data.workers=1", "data.tokenizer=bytes", "strategy.micro_batch_size=1"),
    *(f"checkpoint.every={SAVED}", "checkpoint.keep=9", "strategy.persistence_threshold=0"),
]
CHECKS = """
import math
import torch
from train import checkpoint
load, save = checkpoint.load, checkpoint.Checkpointer.save
def agree(procs, problems, what):
    found = sum(procs.gather(problems[:3]), [])
    if found:
        raise AssertionError(f"{what}: {found[:3]}")
    if procs.is_main:
        with open(procs.log, "a") as file:
            file.write(what + "\\n")
def differences(strategy, reader):
    wrong = []
    for name, kind, start, live in strategy.held():
        stored = torch.from_numpy(reader.read(name, kind, start, live.numel()))
        if not torch.equal(live.detach().cpu().view(torch.int32), stored.view(torch.int32)):
            wrong.append(f"{name} {kind} from {start}")
    return wrong
def uncovered(strategy):
    mine = [(name, kind, start, live.numel()) for name, kind, start, live in strategy.held()]
    everyone = {tuple(piece) for rank in strategy.procs.gather(mine) for piece in rank}
    kinds = {"master", "exp_avg", "exp_avg_sq"} | ({"ema"} if strategy.cfg.optim.ema else set())
    wrong = []
    for name, shape in strategy.shapes.items():
        for kind in sorted(kinds):
            reached = 0
            for start, count in sorted((s, c) for n, k, s, c in everyone if (n, k) == (name, kind)):
                reached += count if start == reached else 0
            if reached != math.prod(shape):
                wrong.append(f"{name} {kind} is held up to {reached} of {math.prod(shape)}")
    return wrong
def computed(strategy, reader):
    wrong = []
    for name, p in strategy.trainable().items():
        whole = p
        if hasattr(p, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters
            with GatheredParameters([p]):
                whole = p.detach().clone()
        elif hasattr(p, "full_tensor"):
            whole = p.full_tensor()
        master = torch.from_numpy(reader.read(name, "master", 0, whole.numel())).view(whole.shape)
        if not torch.equal(whole.detach().cpu(), master.to(whole.dtype)):
            wrong.append(f"{name} computes in {whole.dtype} with other weights")
    return wrong
def checked_load(strategy, reader):
    load(strategy, reader)
    strategy.procs.log = reader.path.parent.parent / "checks"
    agree(strategy.procs, uncovered(strategy) + differences(strategy, reader), f"loaded {reader.step}")
    agree(strategy.procs, computed(strategy, reader), f"computes {reader.step}")
def checked_save(self, step, counters):
    before = self.saved_step
    save(self, step, counters)
    if step == before:
        return
    self.wait()
    self.procs.barrier()
    self.procs.log = self.run.path / "checks"
    reader = checkpoint.Reader(self.run.checkpoint(step))
    reader.verify((self.procs.rank, self.procs.world_size))
    agree(self.procs, uncovered(self.strategy) + differences(self.strategy, reader), f"saved {step}")
checkpoint.load, checkpoint.Checkpointer.save = checked_load, checked_save
from train.strategy import zero
refresh = zero.Zero.refresh
zero.Zero.refresh = lambda self: None if "-stale" in self.cfg.run.name else refresh(self)
"""
"""Executed in every rank: each save and each load is compared, over all ranks, or the run fails. Runs named `-stale` are the
control: they do not rebuild what they compute with."""


@dataclass(frozen=True)
class Cell:
    """A run of `kind` (lm, lora, bf16, ema) under a layout, which goes on from the checkpoint of another one, if any."""

    kind: str
    strategy: str
    world_size: int
    source: Cell | None = None
    way: str = ""

    @property
    def name(self) -> str:
        here = f"{self.kind}-{self.strategy.replace('+', '-')}-{self.world_size}{self.way}"
        return (
            here
            if self.source is None
            else f"{here}-from-{self.source.strategy.replace('+', '-')}-{self.source.world_size}"
        )

    @property
    def reference(self) -> Cell:
        return Cell(self.kind, "single", 1)

    def __str__(self) -> str:
        return f"{self.strategy} on {self.world_size}"


@dataclass
class Lab:
    """Runs cells, those of one number of ranks and the same needs in one launch."""

    root: Path
    errors: dict[Cell, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.root / "data" / "text"
        text.mkdir(parents=True)
        for number in range(10):
            lines = (f"def f_{number}_{i}(x):\n    return x * {i} + {number}\n" for i in range(40))
            (text / f"{number}.py").write_text("\n".join(lines))
        chats = [{"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"{n + 1}."}]}
                 for n in range(60)]  # fmt: skip
        (self.root / "data" / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        trained._base(self.root / "base")

    def overrides(self, cell: Cell) -> list[str]:
        data = self.root / "data"
        if cell.kind == "lora":
            what = [
                "experiment=finetune_lora",
                f"data.path={data}/chats.jsonl",
                f"model.path={self.root}/base",
                "peft.r=4",
            ]
        else:
            what = ["experiment=lm_stdlib", f"data.path={data}/text", *trained.NETWORK, "model.tie_embeddings=true"]
        strategy, _, offload = cell.strategy.partition("+")
        how = [f"strategy={strategy}", f"run.root={self.root}/runs", f"run.name={cell.name}"]
        how += [f"strategy.offload={offload}", f"hardware.nvme_path={self.root}"] if offload else []
        what += ["optim.ema=0.9"] if cell.kind == "ema" else []
        precision = "bf16" if cell.kind == "bf16" else "fp32"
        return [*what, *COMMON, f"train.precision={precision}", *how]

    def path(self, cell: Cell) -> Path:
        return self.root / "runs" / cell.name

    def run(self, cells: list[Cell], setup: str = CHECKS) -> None:
        """Sources first; then whatever goes on from them, in copies that hold their checkpoint of step 6 and no later one."""
        for group in ([c for c in cells if c.source is None], [c for c in cells if c.source is not None]):
            launches: dict[int, list[Cell]] = defaultdict(list)
            for cell in group:
                if cell not in self.errors:
                    launches[cell.world_size].append(cell)
                    self._copy(cell)
            for world_size, together in sorted(launches.items()):
                jobs = [self.overrides(cell) for cell in together]
                for cell, error in zip(
                    together, ranks.run_jobs(world_size, jobs, setup=setup, check=False, timeout_s=3000), strict=True
                ):
                    self.errors[cell] = error

    def _copy(self, cell: Cell) -> None:
        if cell.source is None:
            return
        here, there = self.path(cell.source), self.path(cell)
        if self.errors[cell.source]:
            raise RuntimeError(
                f"{cell.source.name}, which {cell.name} goes on from, failed: {self.errors[cell.source]}"
            )
        there.mkdir(parents=True)
        for name in ("config.yaml", "math.json", "data.json", "events.jsonl", "ledger.jsonl", "metrics.jsonl"):
            shutil.copy(here / name, there / name)
        shutil.copytree(here / "checkpoints" / f"step-{SAVED:08d}", there / "checkpoints" / f"step-{SAVED:08d}")

    def row(self, cell: Cell) -> dict[str, Any]:
        """What a cell gave, beside the unbroken run of one process, and of its own layout where that is its source."""
        row: dict[str, Any] = {"cell": cell, "problem": (self.errors[cell] or "").strip().rpartition("\n")[2]}
        if row["problem"]:
            return row
        found, wanted = ranks.metrics(self.path(cell)), ranks.metrics(self.path(cell.reference))
        after = SAVED if cell.source else 0
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a["step"] > after]
        row["loss"] = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)
        row["norm"] = max(abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in pairs)
        checks = (self.path(cell) / "checks").read_text().split("\n")
        expected = ([f"loaded {SAVED}", f"computes {SAVED}"] if cell.source else [f"saved {SAVED}"]) + [
            f"saved {STEPS}"
        ]
        missing = [check for check in expected if check not in checks]
        engine = ranks.result(self.path(cell))["engine"]
        offload = cell.strategy.partition("+")[2] or "none"
        if (engine["strategy"], engine["offload"], engine["world_size"]) != (
            cell.strategy.partition("+")[0],
            offload,
            cell.world_size,
        ):
            missing.append(f"in force: {engine}")
        if cell.source and (cell.strategy, cell.world_size) == (cell.source.strategy, cell.source.world_size):
            own = ranks.metrics(self.path(cell.source))
            row["bitwise"] = [a["loss_hex"] for a in found] == [b["loss_hex"] for b in own]
            missing += [] if row["bitwise"] else ["other bits than unbroken"]
        limits = BF16 if cell.kind == "bf16" else {"loss": LOSS, "norm": NORM}
        missing += [f"{key} {row[key]:.1e}" for key, limit in limits.items() if not row[key] <= limit]
        missing += ledger.verify(RunDir(self.path(cell)))["problems"]
        row["problem"] = "; ".join(missing)
        return row


def cells() -> list[Cell]:
    """All of the matrix: every layout unbroken, from the reference, from its own and from another's checkpoint."""
    unbroken = [Cell("lm", *layout) for layout in LAYOUTS]
    found = [*unbroken, *(Cell("lm", *layout, unbroken[0]) for layout in LAYOUTS[1:])]
    found += [Cell("lm", *layout, own) for layout, own in zip(LAYOUTS, unbroken, strict=True)]
    found += [Cell("lm", *layout, unbroken[(i + 9) % len(LAYOUTS)]) for i, layout in enumerate(LAYOUTS)
              if (i + 9) % len(LAYOUTS)]  # fmt: skip
    for kind, layouts in {
        "lora": [("single", 1), ("zero3", 2), ("fsdp2", 3), ("ddp", 2), ("zero1", 3), ("zero3+cpu", 2)],
        "ema": [("single", 1), ("zero3", 2), ("fsdp2", 2), ("zero1", 3), ("ddp", 2)],
        "bf16": [("single", 1), ("zero3", 2), ("zero2", 2), ("fsdp2", 2), ("zero1", 3), ("ddp", 3)],
    }.items():
        whole = [Cell(kind, *layout) for layout in layouts]
        found += [*whole, *(Cell(kind, *layout, whole[i - 1]) for i, layout in enumerate(layouts))]
    return found


def sample() -> list[Cell]:
    """Part of the matrix for the tests: four launches."""
    single, zero3 = Cell("lm", "single", 1), Cell("lm", "zero3", 2)
    lora, bf16 = Cell("lora", "single", 1), Cell("bf16", "single", 1)
    return [
        single, lora, bf16, zero3, Cell("lm", "zero3", 2, zero3), Cell("lm", "fsdp2", 2, zero3),
        Cell("lm", "zero2", 2, single), Cell("lm", "zero2", 2, single, "-stale"), Cell("bf16", "zero2", 2, bf16),
        Cell("lora", "zero3", 2, lora),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- chains

CHAINS = {
    "exact": [("single", 1), ("ddp", 4), ("ddp", 2), ("ddp", 3)],
    "fast": [("ddp", 1), ("fsdp2", 4), ("zero3", 2), ("fsdp2", 3)],
}
CHAIN_STEPS, KILLS = 100, (20, 45, 70)


def chain(lab: Lab, numerics: str) -> dict[str, Any]:
    """One run over four sizes, killed in each of the first three and in the last, then left alone; beside the unbroken run."""
    what = [*lab.overrides(Cell("lm", "single", 1)), f"numerics={numerics}", f"train.max_steps={CHAIN_STEPS}"]
    what += ["train.global_batch_size=8", "checkpoint.every=5", "strategy.micro_batch_size=null"]
    ranks.run_jobs(1, [[*what, f"run.name={numerics}-unbroken"]])
    run, kills, resumed = RunDir(lab.root / "runs" / f"{numerics}-chain"), 0, []
    for i, (strategy, world_size) in enumerate([*CHAINS[numerics], CHAINS[numerics][-1]]):
        command = [sys.executable, "-m", "launch", "run", *what, f"run.name={run.path.name}", f"strategy={strategy}"]
        command += [f"hardware.devices_per_node={world_size}"]
        with open(lab.root / f"{numerics}.log", "a") as told:
            process = subprocess.Popen(command, cwd=ROOT, stdout=told, stderr=told)
            if i < len(CHAINS[numerics]):
                kills += _kill_a_rank(process, run, [*KILLS, 90][i])
            code = process.wait(300)
        assert (code == 0) == (i == len(CHAINS[numerics])), (lab.root / f"{numerics}.log").read_text()[-3000:]
        problems = ledger.verify(run)["problems"]
        assert not problems, problems
    unbroken = lab.root / "runs" / f"{numerics}-unbroken"
    found, wanted = ranks.metrics(run.path), ranks.metrics(unbroken)
    loss = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(found, wanted, strict=True))
    resumed = [e["step"] for e in rundir.read_jsonl(run.events) if e["kind"] == "resume"]
    same = ranks.result(run.path)["state_hash"] == ranks.result(unbroken)["state_hash"]
    return {"numerics": numerics, "links": CHAINS[numerics], "kills": kills, "resumed": resumed, "loss": loss, "same": same,
            "redone": ledger.verify(run)["redone"], "good": same if numerics == "exact" else loss <= LOSS}  # fmt: skip


def _kill_a_rank(process: subprocess.Popen, run: RunDir, step: int) -> int:
    """SIGKILL to the last rank once the run has done `step`."""
    while (rundir.last_record(run.ledger) or {"step": 0})["step"] < step:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    below = psutil.Process(process.pid).children(recursive=True)
    trainers = [child for child in below if "launch" not in " ".join(child.cmdline()) and "train" in child.cmdline()]
    trainers[-1].kill()
    return 1


# ----------------------------------------------------------------------------------------------------------------- page


def page(rows: list[dict[str, Any]], chains: list[dict[str, Any]]) -> str:
    lines = [f"# Resuming anywhere, {datetime.date.today()}", "", f"`python benchmarks/resume.py`, {platform.machine()}, "
             f"{os.cpu_count()} cores, torch {metadata.version('torch')}, deepspeed {metadata.version('deepspeed')}."]  # fmt: skip
    if rows:
        pairs = [row for row in rows if row["cell"].source]
        bad = [row for row in rows if row["problem"]]
        worst = {key: max(r[key] for r in pairs if key in r and r["cell"].kind != "bf16") for key in ("loss", "norm")}
        lines += ["", f"{len(rows)} runs, {len(pairs)} of which go on from another's checkpoint of step {SAVED} to step {STEPS}; "
                  f"{len(bad)} with a problem. Largest difference in fp32: losses {worst['loss']:.1e} (limit {LOSS:.0e}), "
                  f"gradient norms {worst['norm']:.1e} (limit {NORM:.0e}). Each save and each load compared bit for bit.", "",
                  "| run | from | loss | gradient norm | own bits | |", "|---|---|---|---|---|---|"]  # fmt: skip
        for row in rows:
            cell, shown = row["cell"], [f"{row[key]:.1e}" if key in row else "" for key in ("loss", "norm")]
            bits = {True: "same", False: "other", None: ""}[row.get("bitwise")]
            lines.append(
                f"| {cell.kind} {cell} | {cell.source or ''} | {' | '.join(shown)} | {bits} | {row['problem']} |"
            )
    for found in chains:
        links = " -> ".join(f"{strategy} on {n}" for strategy, n in found["links"])
        lines += ["", f"Chain, numerics={found['numerics']}: {links}; {found['kills']} ranks killed, resumed at steps "
                  f"{found['resumed']}, {found['redone']} steps redone. Losses within {found['loss']:.1e} of the unbroken run, "
                  f"final state hash {'the same' if found['same'] else 'another'}; `verify` clean after every link."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="matrix, chains; both by default")
    parser.add_argument("--show", action="store_true", help="write no file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        rows, chains = [], []
        if not options.parts or "matrix" in options.parts:
            lab.run(cells())
            rows = [lab.row(cell) for cell in cells()]
        if not options.parts or "chains" in options.parts:
            chains = [chain(lab, numerics) for numerics in CHAINS]
    text = page(rows, chains)
    print(text)
    if not options.show:
        (RESULTS / f"resume_{datetime.date.today()}.md").write_text(text)
    return int(any(row["problem"] for row in rows) or not all(found["good"] for found in chains))


if __name__ == "__main__":
    sys.exit(main())
