"""The planner's memory against a card: what two steps really allocate and reserve, and the largest micro-batch that fits.

    python benchmarks/plan_on_gpu.py                 everything, ten minutes on one card; writes results/plan_on_gpu_DATE.md
    python benchmarks/plan_on_gpu.py --only llama    a part of it, shown and not written

Every configuration runs in a process of its own, in bf16, with the real engine. It asks for a median error of 5 % of what is
allocated and of what is reserved, for no plan that fits and does not, and that under the caps of the 8 GB and the 24 GB tier
the planned micro-batch is at least 90 % of the largest that fits: one a ninth larger must be out of memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.plan_vs_measured import pretrained_model, spelled, two_steps  # noqa: E402

LLAMA = ["experiment=lm_stdlib", "model.hidden_size=1024", "model.intermediate_size=2816", "model.num_layers=12",
         "model.num_heads=16", "model.vocab_size=32000", "data.seq_len=1024", "model.tie_embeddings=false"]  # fmt: skip
GPT2 = ["experiment=lm_stdlib", "model=gpt2", "model.hidden_size=1024", "model.num_layers=12", "model.num_heads=16",
        "model.vocab_size=32000", "data.seq_len=1024", "model.intermediate_size=null"]  # fmt: skip
VIT = ["experiment=classify_digits", "model=vit", "model.hidden_size=768", "model.num_layers=12", "model.num_heads=12",
       "model.patch_size=16", "data.image_size=224"]  # fmt: skip
CONV = ["experiment=classify_digits", "model.channels=96", "model.num_layers=3", "data.image_size=224"]
UNET = ["experiment=segment_digits", "model.channels=64", "model.num_layers=4", "data.image_size=256"]
TUNE = ["experiment=finetune_lora", "data.seq_len=512", "model.path={pretrained}", "data.path=chats.jsonl"]

CONFIGS: dict[str, list[str]] = {
    "llama single": [*LLAMA, "strategy=single", "B=4"],
    "llama single, accumulation": [*LLAMA, "strategy=single", "B=4", "G=8"],
    "llama single, checkpointing": [*LLAMA, "strategy=single", "B=16", "strategy.activation_checkpointing=1"],
    "llama single, every second block": [*LLAMA, "strategy=single", "B=8", "strategy.activation_checkpointing=2"],
    "llama single, chunked loss": [*LLAMA, "strategy=single", "B=8", "strategy.chunked_loss=true"],
    "llama single, sgd": [*LLAMA, "strategy=single", "B=4", "optim=sgd"],
    "llama single, 8-bit AdamW": [*LLAMA, "strategy=single", "B=4", "optim=adamw_8bit"],
    "llama single, dropout": [*LLAMA, "strategy=single", "B=4", "model.dropout=0.1"],
    "llama ddp": [*LLAMA, "strategy=ddp", "B=4"],
    "llama fsdp2": [*LLAMA, "strategy=fsdp2", "B=4"],
    "llama fsdp2, checkpointing": [*LLAMA, "strategy=fsdp2", "B=16", "strategy.activation_checkpointing=1"],
    "llama zero2": [*LLAMA, "strategy=zero2", "B=4"],
    "llama zero3": [*LLAMA, "strategy=zero3", "B=4"],
    "gpt2 single": [*GPT2, "strategy=single", "B=4"],
    "vit single": [*VIT, "strategy=single", "B=64"],
    "convnet single": [*CONV, "strategy=single", "B=32"],
    "unet single": [*UNET, "strategy=single", "B=16"],
    "unet single, checkpointing": [*UNET, "strategy=single", "B=32", "strategy.activation_checkpointing=1"],
    "lora single": [*TUNE, "strategy=single", "B=16"],
    "qlora single": [*TUNE, "peft=qlora", "strategy=single", "B=16"],
}
CAPPED: dict[str, list[str]] = {
    "llama": [*LLAMA, "strategy=single", "G=4096"],
    "unet": [*UNET, "strategy=single", "G=4096"],
    "lora": [*TUNE, "strategy=single", "G=4096"],
}
TIERS = ("gpu_8gb", "gpu_24gb")
MEDIAN, SHARE = 0.05, 0.9


def overrides(texts: list[str], pretrained: Path, *more: str) -> list[str]:
    """What is run here; a configuration that names no global batch makes a step of one micro-batch."""
    micro = [text for text in texts if text.startswith("B=")]
    whole = [] if any(text.startswith("G=") for text in texts) else [text.replace("B=", "G=", 1) for text in micro]
    return [*spelled([*texts, *whole], pretrained), "train.precision=bf16", "optim.warmup_steps=0", *more]


def worker(words: list[str]) -> None:
    import torch

    from train import config, strategy

    found: dict[str, Any]
    try:
        two_steps(config.compose(words))
        found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    except Exception as error:
        found = {"oom": strategy.out_of_memory(error), "error": f"{type(error).__name__}: {str(error)[:200]}"}
    print("PEAK " + json.dumps(found), flush=True)
    os._exit(0)


def measured(words: list[str]) -> dict[str, Any]:
    """`allocated` and `reserved` bytes, or `oom` and `error`."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(words)], cwd=ROOT, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    return json.loads(lines[-1][5:]) if lines else {"oom": False, "error": done.stderr[-300:]}


def compare(name: str, words: list[str]) -> dict[str, Any]:
    """A row of the first table."""
    from train import config
    from train import plan as planner

    best, found = planner.plan(config.compose(words)), measured(words)
    reserved = (best.allocated_gib + best.memory_gib.get("allocator reserve", 0.0)) * 2**30
    row = {
        "name": name,
        "fits": best.fits,
        "predicted": best.allocated_gib * 2**30,
        **found,
    }
    if "error" not in found:
        row["error_allocated"] = row["predicted"] / found["allocated"] - 1
        row["error_reserved"] = reserved / found["reserved"] - 1
    return row


def capped(name: str, tier: str, texts: list[str], pretrained: Path) -> dict[str, Any]:
    """A row of the second: the planned micro-batch fits, one a ninth larger does not."""
    from train import config
    from train import plan as planner

    words = overrides(texts, pretrained, f"hardware={tier}")
    planned = planner.plan(config.compose(words)).micro_batch_size
    larger = int(planned / SHARE) + 1

    def at(size: int) -> dict[str, Any]:
        one = [word for word in words if not word.startswith("train.global_batch_size")]
        return measured([*one, f"strategy.micro_batch_size={size}", f"train.global_batch_size={size}"])

    fits, above = at(planned), at(larger)
    return {"name": name, "tier": tier, "planned": planned, "larger": larger, "planned_fits": "error" not in fits,
            "larger_is_out_of_memory": bool(above.get("oom")), "why": fits.get("error", "")}  # fmt: skip


def judge(rows: list[dict[str, Any]], caps: list[dict[str, Any]]) -> list[str]:
    """What does not hold."""
    wrong = [f"{r['name']}: {r['error']}" for r in rows if "error" in r and (r["fits"] or not r["oom"])]
    for key in ("error_allocated", "error_reserved"):
        sizes = [abs(r[key]) for r in rows if key in r]
        if sizes and statistics.median(sizes) > MEDIAN:
            wrong.append(f"median of {key}: {statistics.median(sizes):.1%}")
    for cap in caps:
        if not cap["planned_fits"]:
            wrong.append(f"{cap['name']} on {cap['tier']}: the planned micro-batch {cap['planned']} does not fit")
        if not cap["larger_is_out_of_memory"]:
            wrong.append(f"{cap['name']} on {cap['tier']}: {cap['larger']} fits too, {cap['planned']} was planned")
    return wrong


def page(rows: list[dict[str, Any]], caps: list[dict[str, Any]], wrong: list[str], card: str) -> str:
    out = [f"# The plan beside a card, {datetime.date.today()}", "", card, "",
           "| configuration | allocated, MiB | predicted | error | reserved, MiB | error |",
           "|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        cells = (
            [r["error"][:80], f"{r['predicted'] / 2**20:.0f}", "", "", ""]
            if "error" in r
            else [
                f"{r['allocated'] / 2**20:.0f}",
                f"{r['predicted'] / 2**20:.0f}",
                f"{r['error_allocated']:+.1%}",
                f"{r['reserved'] / 2**20:.0f}",
                f"{r['error_reserved']:+.1%}",
            ]
        )
        out.append(f"| {r['name']} | " + " | ".join(cells) + " |")
    out += [
        "",
        "| capped at | configuration | planned micro-batch | fits | larger | out of memory |",
        "|---|---|---|---|---|---|",
    ]
    out += [f"| {c['tier']} | {c['name']} | {c['planned']} | {c['planned_fits']} | {c['larger']} | "
            f"{c['larger_is_out_of_memory']} |" for c in caps]  # fmt: skip
    return "\n".join([*out, "", *(wrong or ["Everything holds."])]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
    import torch

    if not torch.cuda.is_available():
        print("plan_on_gpu: torch finds no CUDA device here", file=sys.stderr)
        return 2
    card = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}; bf16, two steps each."
    )
    with tempfile.TemporaryDirectory() as directory:
        pretrained = pretrained_model(Path(directory) / "model")
        chosen = {name: texts for name, texts in CONFIGS.items() if options.only in name}
        here = ("hardware=auto", "hardware.device=cuda")
        rows = [compare(name, overrides(texts, pretrained, *here)) for name, texts in chosen.items()]
        caps = [capped(n, t, texts, pretrained) for t in TIERS for n, texts in CAPPED.items() if options.only in n]
    wrong = judge(rows, caps)
    text = page(rows, caps, wrong, card)
    print(text)
    if not options.only:
        (ROOT / "benchmarks" / "results" / f"plan_on_gpu_{datetime.date.today()}.md").write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
