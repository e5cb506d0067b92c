"""The first law, measured: the same experiment under every strategy on any number of ranks gives the same curve.

    python benchmarks/equivalence.py                                    everything: fp32 and bf16 (about an hour on two cores)
    python benchmarks/equivalence.py --precision fp32 --tasks lm --ranks 1 2
    python benchmarks/equivalence.py --sample                           the covering sample that the tests run

Three tasks by one recipe: AdamW at 1e-3, warm-up 10, weight decay 0.1, 50 steps of 8 samples, micro-batches of 2 (so two are
accumulated on two ranks), uneven counts, a clip that bites in some steps and not in others, dropout, and augmentation where
there are images. `lm` is a small Llama on chats, `segment` a U-Net on digits, `lora` adapters on a random Llama. Every row is
compared, step by step, with one plain process; the floor is that process at another micro-batch. What ran is read back from
`result.json`. Writes `docs/equivalence.md`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import ranks  # noqa: E402

STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2+cpu", "zero3+cpu", "zero3+nvme")
LIMITS = {
    "fp32": {"floor": 1e-6, "loss": 1e-5, "norm": 1e-3, "masters": 1e-5},
    "bf16": {"floor": 1e-2, "loss": 1e-2, "norm": 5e-2, "first": 1e-3},
}
RECIPE = [
    "hardware=cpu",
    "optim.lr=1e-3",
    "optim.warmup_steps=10",
    "optim.weight_decay=0.1",
    "train.max_steps=50",
    "train.max_epochs=null",
    "train.max_tokens=null",
    "train.global_batch_size=8",
    "tracker=none",
    "eval.every=null",
    "eval.max_samples=8",
    "eval.samples=0",
    "log.every=10",
    "strategy.persistence_threshold=0",
    "checkpoint.keep_best=false",
]
CHATS = [
    "experiment=lm_stdlib",
    "data=chat",
    "data.path=stdlib",
    "data.glob=null",
    "data.tokenizer_vocab_size=384",
    "data.seq_len=256",
]
TINY = ["model.hidden_size=64", "model.num_layers=2", "model.num_heads=2"]
TASKS = {
    "lm": [*CHATS, *TINY, "model.dropout=0.1", "optim.clip=1.0"],
    "segment": [
        "experiment=segment_digits",
        "data.image_size=32",
        "model.channels=16",
        "model.num_layers=2",
        "model.dropout=0.1",
        "data.augment=[shift,scale]",
        "optim.clip=1.0",
    ],
    "lora": [*CHATS, "peft=lora", "peft.r=8", "peft.alpha=64", "peft.dropout=0.1", "optim.clip=1.0"],
}


@dataclass(frozen=True)
class Cell:
    task: str
    strategy: str
    world_size: int
    precision: str
    micro: int = 2

    @property
    def name(self) -> str:
        return f"{self.task}-{self.strategy.replace('+', '-')}-{self.world_size}-{self.precision}-m{self.micro}"

    def overrides(self, root: Path, base: Path) -> list[str]:
        strategy, _, offload = self.strategy.partition("+")
        more = [f"strategy.offload={offload}", f"hardware.nvme_path={root}"] if offload else []
        more += [f"model.path={base}", f"data.tokenizer={base}"] if self.task == "lora" else []
        return [
            *TASKS[self.task],
            *RECIPE,
            *more,
            f"strategy={strategy}",
            f"train.precision={self.precision}",
            f"strategy.micro_batch_size={self.micro}",
            f"run.root={root}",
            f"run.name={self.name}",
        ]


def base_model(root: Path) -> Path:
    """A tiny random Llama with a tokenizer, as a Hugging Face directory, for the adapters."""
    import torch
    import transformers

    from train import config, data
    from train.data import tokenizer

    cfg = config.compose([*TASKS["lm"], *RECIPE])
    prepared = data.prepare(cfg, lambda _: None)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=prepared.info["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    target = root / "base"
    transformers.LlamaForCausalLM(shape).save_pretrained(target)
    tokenizer.save(Path(prepared.info["tokenizer"]), target)
    return target


def run(cells: list[Cell], root: Path, *, timeout_s: float = 3000) -> dict[Cell, dict[str, Any]]:
    """Train every cell, with one launch per number of ranks, and compare each with its reference."""
    base = base_model(root) if any(c.task == "lora" for c in cells) else root
    references = {Cell(c.task, "single", 1, c.precision) for c in cells}
    everything = sorted({*cells, *references}, key=lambda c: (c.world_size, c.name))
    errors: dict[Cell, str | None] = {}
    for world_size, group in itertools.groupby(everything, key=lambda c: c.world_size):
        chosen = list(group)
        print(f"{world_size} ranks: {len(chosen)} runs", flush=True)
        found = ranks.run_jobs(world_size, [c.overrides(root, base) for c in chosen], timeout_s=timeout_s, check=False)
        errors.update(zip(chosen, found, strict=True))
    return {
        c: {"error": errors[c]}
        if errors[c]
        else compare(root / c.name, root / Cell(c.task, "single", 1, c.precision).name)
        for c in cells
    }


def compare(path: Path, reference: Path) -> dict[str, Any]:
    """Largest relative differences over all steps, and what was in force."""
    a, b = ranks.metrics(path), ranks.metrics(reference)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    result = ranks.result(path)
    assert result["math_hash"] == ranks.result(reference)["math_hash"]
    return {
        "loss": max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a, b, strict=True)),
        "first": abs(a[0]["loss"] - b[0]["loss"]) / abs(b[0]["loss"]),
        "norm": max(abs(x["grad_norm"] - y["grad_norm"]) / y["grad_norm"] for x, y in zip(a, b, strict=True)),
        "masters": masters(path, reference),
        "clipped": sum(row["grad_norm"] > 1.0 for row in a),
        "fell": 1 - sum(r["loss"] for r in a[-5:]) / sum(r["loss"] for r in a[:5]),
        "engine": result["engine"],
    }


def masters(path: Path, reference: Path) -> float:
    """Distance of the final masters, ||a - b|| / ||b||, the largest of all parameters."""
    from train import checkpoint

    a, b = (checkpoint.read_masters(p, "last") for p in (path, reference))
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-8)) for n in a)


def problems(cell: Cell, found: dict[str, Any]) -> list[str]:
    """Why a row does not hold."""
    if found.get("error"):
        return [found["error"].strip().splitlines()[-1]]
    limits = LIMITS[cell.precision]
    wrong = [
        f"{k} {found[k]:.1e} > {limits[k]:g}"
        for k in ("norm", "first", "masters")
        if k in limits and found[k] > limits[k]
    ]
    allowed = limits["floor"] if cell.strategy == "single" else limits["loss"]
    if found["loss"] > allowed:
        wrong.append(f"loss {found['loss']:.1e} > {allowed:g}")
    strategy, _, offload = cell.strategy.partition("+")
    for key, value in (
        ("strategy", strategy),
        ("offload", offload or "none"),
        ("world_size", cell.world_size),
        ("precision", cell.precision),
    ):
        if found["engine"][key] != value:
            wrong.append(f"{key}: asked {value}, got {found['engine'][key]}")
    return wrong


def table(results: dict[Cell, dict[str, Any]]) -> list[str]:
    lines = [
        "| task | asked | ranks | loss | gradient norm | final masters | steps clipped | loss fell by | in force |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, found in results.items():
        if found.get("error"):
            lines.append(
                f"| {cell.task} | {cell.strategy} | {cell.world_size} | failed: {problems(cell, found)[0][:120]} | | | | | |"
            )
            continue
        e = found["engine"]
        label = f"floor (single, micro-batch {cell.micro})" if cell.strategy == "single" else cell.strategy
        force = f"{e['strategy']}, offload {e['offload']}, world {e['world_size']}, {e['optimizer_class']}, {e['parameter_dtype']}"
        mark = "" if not problems(cell, found) else " **out**"
        lines.append(
            f"| {cell.task} | {label} | {cell.world_size} | {found['loss']:.1e}{mark} | {found['norm']:.1e} | "
            f"{found['masters']:.1e} | {found['clipped']} of 50 | {found['fell']:.0%} | {force} |"
        )
    return lines


def matrix(tasks: list[str], world_sizes: list[int], precision: str) -> list[Cell]:
    cells = []
    for task in tasks:
        cells.append(Cell(task, "single", 1, precision, micro=4))
        for strategy, world_size in itertools.product(STRATEGIES[1:], world_sizes):
            if strategy == "zero3+nvme" and (world_size != 2 or task != "lm"):
                continue  # one row: it is the swapper that differs, not the mathematics
            cells.append(Cell(task, strategy, world_size, precision))
    return cells


# Every strategy, every task, every number of ranks and both precisions at least once.
SAMPLE = [
    Cell("lm", "single", 1, "fp32", 4),
    Cell("lm", "ddp", 3, "fp32"),
    Cell("lm", "fsdp2", 2, "fp32"),
    Cell("lm", "zero1", 2, "fp32"),
    Cell("lm", "zero3", 3, "fp32"),
    Cell("lora", "zero2", 3, "fp32"),
    Cell("lora", "fsdp2", 3, "fp32"),
    Cell("lora", "zero3", 2, "fp32"),
    Cell("segment", "fsdp2", 3, "fp32"),
    Cell("segment", "zero2", 2, "fp32"),
    Cell("segment", "ddp", 2, "fp32"),
    Cell("lm", "fsdp2", 2, "bf16"),
    Cell("lm", "zero2", 2, "bf16"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(LIMITS))
    parser.add_argument("--sample", action="store_true", help="the covering sample only; writes nothing")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="equivalence-"))
    cells = (
        SAMPLE if options.sample else [c for p in options.precision for c in matrix(options.tasks, options.ranks, p)]
    )
    results = run(cells, root)
    import torch

    lines = [
        f"# The same curve on every engine\n\nMeasured {datetime.date.today()}, torch {torch.__version__}, CPU, gloo, by "
        f"`python benchmarks/equivalence.py {' '.join(sys.argv[1:])}`. Largest relative difference over all 50 steps to one "
        "plain process. Bounds: in fp32 floor 1e-6, losses 1e-5, gradient norms 1e-3, masters 1e-5; in bf16 losses 1e-2, "
        "gradient norms 5e-2.\n"
    ]
    for precision in dict.fromkeys(c.precision for c in cells):
        lines += [f"\n## {precision}\n", *table({c: r for c, r in results.items() if c.precision == precision})]
    print("\n".join(lines))
    if not options.sample:
        (ROOT / "docs" / "equivalence.md").write_text("\n".join(lines) + "\n")
        (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
        (ROOT / "benchmarks" / "results" / f"equivalence_{datetime.date.today()}.json").write_text(
            json.dumps([{**vars(c), **r} for c, r in results.items()], indent=1, default=str)
        )
    shutil.rmtree(root, ignore_errors=True)
    wrong = {c.name: p for c, r in results.items() if (p := problems(c, r))}
    print("\n".join(f"{n}: {p}" for n, p in wrong.items()) or "every row holds")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
