"""The first law, measured: the same experiment under every strategy on any number of ranks gives the same curve.

    python benchmarks/equivalence.py                                                  everything, half an hour on two cores
    python benchmarks/equivalence.py matrix --precision fp32 --tasks lm --ranks 1 2   a part of it
    python benchmarks/equivalence.py exact controls                                   the same bits; what has to fail
    python benchmarks/equivalence.py sample                                           the covering sample that the tests run
    python benchmarks/equivalence.py --show                                           writes the page from what is recorded

Three tasks by one recipe: AdamW at 1e-3, warm-up 10, weight decay 0.1, 50 steps of 8 samples, two micro-batches accumulated
on every number of ranks, uneven counts, a clip that bites in some steps and not in others, dropout, augmentation where
there are images, a loss that falls by 30 % at least; the reference run itself has to show the last ones. `lm` is a Llama
on packed chats, `segment` a U-Net on digits, `lora` adapters on a random Llama. Every row is compared, step by step, with
one plain process; the floor is that process at another micro-batch. What ran is read back from `result.json`.

Results are merged into `benchmarks/results/equivalence.json`, from which `docs/equivalence.md` is written. A part may be
measured anew: rows of another recipe (another math hash) leave the file. With `--root DIR` the runs are kept there, and a
measurement that was cut goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import ranks, sabotage  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "equivalence.json"
PAGE = ROOT / "docs" / "equivalence.md"
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2+cpu", "zero3+cpu", "zero3+nvme")
STEPS, SAMPLES = 50, 8
LIMITS = {
    "fp32": {"floor": 1e-6, "loss": 1e-5, "norm": 1e-3, "masters": 1e-5},
    "bf16": {"floor": 1e-2, "loss": 1e-2, "norm": 5e-2, "first": 1e-3},
}
RECIPE = [
    "hardware=cpu",
    "optim.lr=1e-3",
    "optim.warmup_steps=10",
    "optim.schedule=constant",
    "optim.weight_decay=0.1",
    f"train.max_steps={STEPS}",
    "train.max_epochs=null",
    "train.max_tokens=null",
    f"train.global_batch_size={SAMPLES}",
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
    "data.tokenizer=bytes",
    "data.seq_len=256",
]
TINY = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_layers=2", "model.num_heads=2"]
TASKS = {
    "lm": [*CHATS, *TINY, "model.dropout=0.1", "optim.clip=1.3"],
    "segment": [
        "experiment=segment_digits",
        "data.image_size=16",
        "model.channels=8",
        "model.num_layers=2",
        "model.dropout=0.05",
        "task.dice_weight=0.1",
        "data.augment=[shift,scale]",
        "optim.clip=0.9",
    ],
    "lora": [*CHATS, "peft=lora", "peft.r=8", "peft.alpha=40", "peft.dropout=0.1", "optim.clip=4.0"],
}


@dataclass(frozen=True)
class Cell:
    """One run. `strategy` is `zero2+cpu` where state is offloaded; `micro` 0 accumulates two micro-batches."""

    task: str
    strategy: str
    world_size: int
    precision: str
    micro: int = 0
    numerics: str = "fast"
    way: str = ""
    """The way of `tests/sabotage.py` in which it is wrong."""

    @property
    def name(self) -> str:
        kind = self.strategy.replace("+", "-") + (f"-m{self.micro}" if self.micro else "")
        plain = f"{self.task}-{kind}-{self.world_size}-{self.precision}-{self.numerics}"
        return f"{plain}--{self.way}" if self.way else plain

    @property
    def reference(self) -> Cell:
        return Cell(self.task, "single", 1, self.precision, numerics=self.numerics)

    def overrides(self, root: Path, base: Path) -> list[str]:
        strategy, _, offload = self.strategy.partition("+")
        share = -(-SAMPLES // self.world_size)
        micro = "null" if self.numerics == "exact" else self.micro or -(-share // 2)
        more = [f"strategy.offload={offload}", f"hardware.nvme_path={root}"] if offload else []
        more += [f"model.path={base}", f"data.tokenizer={base}"] if self.task == "lora" else []
        return [
            *TASKS[self.task],
            *RECIPE,
            *more,
            f"strategy={strategy}",
            f"numerics={self.numerics}",
            f"train.precision={self.precision}",
            f"strategy.micro_batch_size={micro}",
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
        initializer_range=0.3,
    )
    target = root / "base"
    transformers.LlamaForCausalLM(shape).save_pretrained(target)
    tokenizer.save(Path(prepared.info["tokenizer"]), target)
    return target


def run(cells: list[Cell], root: Path, *, timeout_s: float = 3000) -> dict[Cell, dict[str, Any]]:
    """Train every cell and its reference, with one launch per number of ranks; what `compare` found of each."""
    base = base_model(root) if any(c.task == "lora" for c in cells) else root
    compared = [c for c in cells if c.way not in sabotage.STARTS]  # those never get as far as a curve
    everything = sorted({*cells, *(c.reference for c in compared)}, key=lambda c: (c.world_size, c.name))
    errors: dict[Cell, str | None] = {}
    for world_size, group in itertools.groupby(everything, key=lambda c: c.world_size):
        chosen = list(group)
        print(f"{world_size} ranks: {len(chosen)} runs", flush=True)
        jobs = [c.overrides(root, base) for c in chosen]
        found = ranks.run_jobs(world_size, jobs, setup=sabotage.SETUP, timeout_s=timeout_s, check=False)
        errors.update(zip(chosen, found, strict=True))
    for cell in {c.reference for c in compared}:
        if errors[cell]:
            raise RuntimeError(f"the reference {cell.name} failed:\n{errors[cell]}")
    cells, compared = (list(dict.fromkeys([*(c.reference for c in compared), *some])) for some in (cells, compared))
    ended = {c: (errors[c] or "it was not refused").strip().splitlines()[-1] for c in cells}
    return {
        c: compare(root / c.name, root / c.reference.name) if c in compared and not errors[c] else {"error": ended[c]}
        for c in cells
    }


def compare(path: Path, reference: Path) -> dict[str, Any]:
    """Largest relative differences over all steps, what was in force, and what the recipe asks of a curve."""
    a, b = ranks.metrics(path), ranks.metrics(reference)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    result = ranks.result(path)
    assert result["math_hash"] == ranks.result(reference)["math_hash"]
    norms = [row["grad_norm"] for row in a]
    return {
        "loss": max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a, b, strict=True)),
        "first": abs(a[0]["loss"] - b[0]["loss"]) / abs(b[0]["loss"]),
        "norm": max(abs(x["grad_norm"] - y["grad_norm"]) / y["grad_norm"] for x, y in zip(a, b, strict=True)),
        "masters": masters(path, reference),
        "norms": [min(norms), sorted(norms)[len(norms) // 2], max(norms)],
        "clipped": sum(norm > result["engine"]["clip"] for norm in norms),
        "fell": 1 - sum(r["loss"] for r in a[-5:]) / sum(r["loss"] for r in a[:5]),
        "step_s": sorted(row["step_s"] for row in a)[len(a) // 2],
        "engine": result["engine"],
        "math_hash": result["math_hash"],
        "state_hash": result["state_hash"],
        "same_hash": result["state_hash"] == ranks.result(reference)["state_hash"],
    }


def masters(path: Path, reference: Path) -> float:
    """Distance of the final masters, ||a - b|| / ||b||, the largest of all parameters."""
    from train import checkpoint

    a, b = (checkpoint.read_masters(p, "last") for p in (path, reference))
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-8)) for n in a)


def problems(cell: Cell, found: dict[str, Any]) -> list[str]:
    """Why a row does not hold."""
    if "error" in found:
        return [found["error"]]
    wrong = []
    if cell == cell.reference:
        if found["fell"] < 0.3:
            wrong.append(f"the loss fell by {found['fell']:.0%} only")
        if not STEPS / 10 <= found["clipped"] <= STEPS * 9 / 10:
            wrong.append(f"clipped in {found['clipped']} of {STEPS} steps")
    elif cell.numerics == "exact":
        if found["loss"] or found["masters"] or not found["same_hash"]:
            wrong.append("other bits")
    else:
        limits = LIMITS[cell.precision]
        checked = {k: limits[k] for k in ("norm", "first", "masters") if k in limits}
        checked["loss"] = limits["floor" if cell.strategy == "single" else "loss"]
        wrong += [f"{k} {found[k]:.1e} > {limit:g}" for k, limit in checked.items() if not found[k] <= limit]
    strategy, _, offload = cell.strategy.partition("+")
    asked = {
        "strategy": strategy,
        "zero_stage": int(strategy[-1]) if strategy.startswith("zero") else 0,
        "offload": offload or "none",
        "world_size": cell.world_size,
        "precision": cell.precision,
        "numerics": cell.numerics,
        **dict.fromkeys(("accumulation_dtype", "reduce_dtype", "master_dtype"), "float32"),
    }
    if not cell.micro and cell.numerics == "fast":
        asked["gradient_accumulation_steps"] = 2
    return wrong + [f"{k}: asked {v}, got {found['engine'][k]}" for k, v in asked.items() if found["engine"][k] != v]


# ------------------------------------------------------------------------------------------------------------ what runs


def matrix(tasks: list[str], strategies: list[str], world_sizes: list[int], precisions: list[str]) -> list[Cell]:
    cells = []
    for precision, task in itertools.product(precisions, tasks):
        if 1 in world_sizes:
            cells.append(Cell(task, "single", 1, precision, micro=1))
        for strategy, world_size in itertools.product(strategies, world_sizes):
            if strategy == "zero3+nvme" and (world_size, task, precision) != (2, "lm", "fp32"):
                continue  # one row: it is the swapper that differs, not the mathematics
            cells.append(Cell(task, strategy, world_size, precision))
    return cells


EXACT = [
    *(Cell(t, "ddp", n, "fp32", numerics="exact") for t in ("lm", "segment") for n in (2, 3, 4, 8)),
    *(Cell("lm", "ddp", n, "bf16", numerics="exact") for n in (2, 3)),
    Cell("lm", "ddp", 3, "fp32", numerics="exact", way=sabotage.RANK_ORDER),  # two ranks' order is that of the tree
]
CONTROLS = [
    *(Cell("lm", "ddp", 2, "fp32", way=way) for way in sabotage.CURVES),
    *(Cell("lm", strategy, 2, precision, way=way) for way, (strategy, precision, _) in sabotage.STARTS.items()),
]
# Every strategy, every task and both precisions at least once, on two ranks and on three.
SAMPLE = [
    Cell("lm", "single", 1, "fp32", micro=1),
    Cell("lm", "ddp", 3, "fp32"),
    Cell("lm", "fsdp2", 3, "fp32"),
    Cell("lm", "zero1", 3, "fp32"),
    Cell("lm", "zero3+cpu", 2, "fp32"),
    Cell("segment", "single", 1, "fp32", micro=1),
    Cell("segment", "ddp", 2, "fp32"),
    Cell("segment", "fsdp2", 2, "fp32"),
    Cell("segment", "zero3", 3, "fp32"),
    Cell("segment", "zero2+cpu", 2, "fp32"),
    Cell("lora", "ddp", 2, "fp32"),
    Cell("lora", "fsdp2", 3, "fp32"),
    Cell("lora", "zero1", 2, "fp32"),
    Cell("lora", "zero2", 3, "fp32"),
    Cell("lora", "zero3", 2, "fp32"),
    Cell("lora", "zero2+cpu", 2, "fp32"),
    Cell("lora", "zero3+cpu", 2, "fp32"),
    Cell("segment", "fsdp2", 2, "bf16"),
    Cell("segment", "zero2", 2, "bf16"),
]

# -------------------------------------------------------------------------------------------------------------- the page


def record(results: dict[Cell, dict[str, Any]]) -> dict[Cell, dict[str, Any]]:
    """Merge `results` into the file of results; everything that it holds now."""
    import torch

    kept = load()
    now = {"date": str(datetime.date.today()), "torch": torch.__version__, "machine": machine()}
    recipes = {(c.task, c.precision): r["math_hash"] for c, r in results.items() if "error" not in r}
    for cell, found in list(kept.items()):
        recipe = recipes.get((cell.task, cell.precision), found.get("math_hash"))
        if found.get("math_hash") not in (None, recipe):
            del kept[cell]
    kept |= {cell: {**found, **now} for cell, found in results.items()}
    rows = [{**asdict(c), **found} for c, found in kept.items()]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return kept


def machine() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(models)} cores of {models[0]}" if models else platform.machine()


def load() -> dict[Cell, dict[str, Any]]:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    names = Cell.__dataclass_fields__
    return {Cell(**{k: row[k] for k in names}): {k: v for k, v in row.items() if k not in names} for row in rows}


def page(results: dict[Cell, dict[str, Any]]) -> str:
    """`docs/equivalence.md`."""
    dates = sorted({r["date"] for r in results.values()})
    plain = {c: r for c, r in results.items() if c.numerics == "fast" and not c.way and c != c.reference}
    references = {c: r for c, r in results.items() if c == c.reference and c.numerics == "fast"}
    lines = [
        "# The same curve on every engine\n",
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} by `make equivalence` on a CPU "
        f"({', '.join(sorted({r['machine'] for r in results.values()}))}; gloo; torch "
        f"{', '.join(sorted({r['torch'] for r in results.values()}))}). A row is a run of {STEPS} steps of {SAMPLES} samples "
        "beside the same run in one plain process: the largest relative difference of any step. The recipe and the bounds "
        "are in [the design](design.md): in fp32 floor 1e-6, losses 1e-5, gradient norms 1e-3, final masters 1e-5; in bf16 "
        "the first loss 1e-3, all losses 1e-2, gradient norms 5e-2. A row out of its bounds says **out**. *In force* is "
        "read from the live objects of the run.\n",
        "## What the reference runs show\n",
        "The recipe asks for a loss that falls by 30 % and a clip that bites in some steps only.\n",
        "| task | precision | loss fell by | gradient norm, least, median, most | clip | steps clipped | |",
        "|---|---|---|---|---|---|---|",
    ]
    for c, r in sorted(references.items(), key=lambda item: item[0].precision, reverse=True):
        low, middle, high = r["norms"]
        lines.append(
            f"| {c.task} | {c.precision} | {r['fell']:.0%} | {low:.2f}, {middle:.2f}, {high:.2f} | {r['engine']['clip']} | "
            f"{r['clipped']} of {STEPS} | {said(c, r)} |"
        )
    for precision in LIMITS:
        chosen = {c: r for c, r in plain.items() if c.precision == precision}
        held = sum(not problems(c, r) for c, r in chosen.items())
        whole = set(matrix(list(TASKS), list(STRATEGIES), [1, 2, 3, 4], [precision]))
        missing = (
            f" {len(whole - set(chosen))} rows of the whole matrix are not measured yet." if whole - set(chosen) else ""
        )
        lines += [f"\n## {precision}\n", f"{held} of {len(chosen)} rows hold.{missing}\n", *table(chosen)]
    lines += ["\n## The same bits\n", *exact_table(results), "\n## What has to fail\n", *control_table(results)]
    return "\n".join(lines) + "\n"


def said(cell: Cell, found: dict[str, Any]) -> str:
    return f"**out**: {'; '.join(problems(cell, found))}" if problems(cell, found) else "holds"


def in_force(engine: dict[str, Any]) -> str:
    offload = "" if engine["offload"] == "none" else f", offload {engine['offload']}"
    return (
        f"{engine['model_class']}, stage {engine['zero_stage']}{offload}, world {engine['world_size']}, "
        f"{engine['optimizer_class']}, parameters {engine['parameter_dtype']}, sums {engine['accumulation_dtype']}, reduction "
        f"{engine['reduce_dtype']}, masters {engine['master_dtype']}"
    )


def table(results: dict[Cell, dict[str, Any]]) -> list[str]:
    lines = [
        "| task | asked | ranks | first loss | all losses | gradient norm | final masters | | in force |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = ["single", *STRATEGIES]
    for c in sorted(results, key=lambda c: (list(TASKS).index(c.task), order.index(c.strategy), c.world_size)):
        r = results[c]
        label = f"floor: single, micro-batch {c.micro}" if c.strategy == "single" else c.strategy
        found = (
            ["", "", "", "", said(c, r)[:150], ""]
            if "error" in r
            else [*(f"{r[k]:.1e}" for k in ("first", "loss", "norm", "masters")), said(c, r), in_force(r["engine"])]
        )
        lines.append(f"| {c.task} | {label} | {c.world_size} | " + " | ".join(found) + " |")
    return lines


def exact_table(results: dict[Cell, dict[str, Any]]) -> list[str]:
    """`numerics=exact`: the hash of masters and moments after the last step."""
    lines = [
        "`numerics=exact` over the same 50 steps, dropout, augmentation, uneven counts, clip and accumulation included: the "
        "hash of all masters and moments after the last, on any number of processes. Summed rank by rank instead of along "
        "the tree, it has to be another.\n",
        "| task | precision | processes | state hash | time of a step | |",
        "|---|---|---|---|---|---|",
    ]
    chosen = [c for c in results if c.numerics == "exact"]
    for c in sorted(chosen, key=lambda c: (c.way, c.precision != "fp32", c.task, c.world_size)):
        r = results[c]
        if "error" in r:
            lines.append(f"| {c.task} | {c.precision} | {c.world_size} | | | {r['error'][:150]} |")
            continue
        same = r["same_hash"]
        word = "the reference" if c == c.reference else "the same" if same else "another"
        word += f" (summed {c.way})" if c.way else "" if same else " **out**"
        lines.append(
            f"| {c.task} | {c.precision} | {c.world_size} | `{r['state_hash'][:16]}` | {r['step_s'] * 1e3:.0f} ms | {word} |"
        )
    return lines


def control_table(results: dict[Cell, dict[str, Any]]) -> list[str]:
    lines = [
        "Each of these is the product, broken on purpose (`tests/sabotage.py`), on two ranks. A row that went unnoticed "
        "would mean that the tables above show nothing.\n",
        "| what is wrong | strategy | noticed |",
        "|---|---|---|",
    ]
    for c, r in results.items():
        if c.way in sabotage.CURVES or c.way in sabotage.STARTS:
            label = sabotage.CURVES.get(c.way, c.way.replace("-", " "))
            where = "at start-up: " if "error" in r else "in the curve: "
            noticed = where + "; ".join(problems(c, r))[:220] if problems(c, r) else "**no**"
            lines.append(f"| {label} | {c.strategy}, {c.precision} | {noticed} |")
    return lines


def failures(results: dict[Cell, dict[str, Any]]) -> dict[str, list[str]]:
    """Rows that do not hold, and controls that do."""
    wrong = {}
    for cell, found in results.items():
        seen = problems(cell, found)
        if cell.way in sabotage.STARTS:
            words = sabotage.STARTS[cell.way][2]
            seen = [] if words in found.get("error", "") else [f"not refused with {words!r}: {seen}"]
        elif cell.way:
            seen = [found["error"]] if "error" in found else [] if seen else ["went unnoticed"]
        if seen:
            wrong[cell.name] = seen
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help="matrix, exact, controls (these by default), sample")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--precision", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--root", type=Path, help="keep the runs here, and take those that are finished from here")
    parser.add_argument("--show", action="store_true", help="run nothing, write the page")
    options = parser.parse_args()
    parts = options.parts or ["matrix", "exact", "controls"]
    cells = []
    if "matrix" in parts:
        world_sizes = [n for n in options.ranks if n <= 4]
        cells += matrix(options.tasks, options.strategies, world_sizes, options.precision)
    if "exact" in parts:
        cells += [c for c in EXACT if c.task in options.tasks and c.precision in options.precision]
    if "controls" in parts:
        cells += CONTROLS
    if "sample" in parts:
        cells += SAMPLE
    if options.show:
        PAGE.write_text(page(load()))
        return
    root = options.root or Path(tempfile.mkdtemp(prefix="equivalence-"))
    try:
        results = run([c for c in cells if c.world_size in options.ranks], root)
    finally:
        if options.root is None:
            shutil.rmtree(root, ignore_errors=True)
    PAGE.write_text(page(record(results)))
    wrong = failures(results)
    print("\n".join(f"{n}: {'; '.join(p)}" for n, p in wrong.items()) or "every row holds, and every control fails")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
