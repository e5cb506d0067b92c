"""The planner's memory against the peak of the profiler's allocator events, on this machine's CPU, with the real engines.

    python benchmarks/plan_vs_measured.py [--json | --markdown] [--only PATTERN]
    python benchmarks/plan_vs_measured.py --markdown --merge ONE.json OTHER.json      measured then, predicted now

Every configuration is composed as a run would be; its engine is built by `train.strategy`, prepared, and taken through two
whole steps (two, because optimizer state appears in the first). What the CPU's allocator handed out and took back meanwhile
is read from torch's profiler, which knows nothing of the planner or its tracer. Several ranks are several processes; the
rank with the highest peak counts. Peaks under 200 MiB are shown and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LLAMA = ["experiment=lm_stdlib", "model.hidden_size=512", "model.intermediate_size=1408", "model.num_layers=6", "model.num_heads=8",
         "model.vocab_size=8192", "data.seq_len=256", "model.tie_embeddings=false"]  # fmt: skip
GPT2 = [*LLAMA[:1], "model=gpt2", "model.hidden_size=512", "model.num_layers=5", "model.num_heads=8", "model.vocab_size=8192",
        "data.seq_len=256", "model.intermediate_size=null"]  # fmt: skip
VIT = ["experiment=classify_digits", "model=vit", "model.hidden_size=384", "model.num_layers=6", "model.num_heads=6",
       "model.patch_size=4", "data.image_size=64"]  # fmt: skip
CONV = ["experiment=classify_digits", "model.channels=96", "model.num_layers=3", "data.image_size=64"]
UNET = ["experiment=segment_digits", "model.channels=64", "model.num_layers=3", "data.image_size=192"]
TUNE = ["experiment=finetune_lora", "data.seq_len=256", "model.path={pretrained}", "data.path=chats.jsonl"]

CONFIGS: dict[str, tuple[int, list[str]]] = {
    "llama single": (1, [*LLAMA, "strategy=single", "B=4", "G=4"]),
    "llama single, accumulation 2": (1, [*LLAMA, "strategy=single", "B=4", "G=8"]),
    "llama single, checkpointing": (
        1,
        [*LLAMA, "strategy=single", "B=8", "G=8", "strategy.activation_checkpointing=1"],
    ),
    "llama single, every second block": (
        1,
        [*LLAMA, "strategy=single", "B=8", "G=8", "strategy.activation_checkpointing=2"],
    ),
    "llama single, chunked loss": (1, [*LLAMA, "strategy=single", "B=8", "G=8", "strategy.chunked_loss=true"]),
    "llama single, tied": (1, [*LLAMA, "model.tie_embeddings=true", "strategy=single", "B=4", "G=4"]),
    "llama single, sgd": (1, [*LLAMA, "optim=sgd", "strategy=single", "B=4", "G=4"]),
    "llama single, average of weights": (1, [*LLAMA, "optim.ema=0.99", "strategy=single", "B=2", "G=2"]),
    "llama single, dropout": (1, [*LLAMA, "model.dropout=0.1", "strategy=single", "B=4", "G=4"]),
    "gpt2 single": (1, [*GPT2, "strategy=single", "B=4", "G=4"]),
    "vit single": (1, [*VIT, "strategy=single", "B=16", "G=16"]),
    "convnet single": (1, [*CONV, "strategy=single", "B=16", "G=16"]),
    "unet single": (1, [*UNET, "strategy=single", "B=8", "G=8"]),
    "unet single, checkpointing": (
        1,
        [*UNET, "strategy=single", "B=16", "G=16", "strategy.activation_checkpointing=1"],
    ),
    "lora single": (1, [*TUNE, "strategy=single", "B=4", "G=4"]),
    "lora single, checkpointing": (
        1,
        [*TUNE, "strategy=single", "B=16", "G=16", "strategy.activation_checkpointing=1"],
    ),
    "qlora single": (1, [*TUNE, "peft=qlora", "strategy=single", "B=4", "G=4"]),
    "llama ddp x2": (2, [*LLAMA, "strategy=ddp", "B=4", "G=8"]),
    "llama ddp x2, accumulation 2": (2, [*LLAMA, "strategy=ddp", "B=2", "G=8"]),
    "unet ddp x2": (2, [*UNET, "strategy=ddp", "B=8", "G=16"]),
    "llama fsdp2 x2": (2, [*LLAMA, "strategy=fsdp2", "B=4", "G=8"]),
    "llama fsdp2 x2, checkpointing": (
        2,
        [*LLAMA, "strategy=fsdp2", "B=4", "G=8", "strategy.activation_checkpointing=1"],
    ),
    "llama fsdp2 x2, accumulation 2": (2, [*LLAMA, "strategy=fsdp2", "B=2", "G=8"]),
    "llama fsdp2 x3": (3, [*LLAMA, "strategy=fsdp2", "B=4", "G=12"]),
    "vit fsdp2 x2": (2, [*VIT, "strategy=fsdp2", "B=16", "G=32"]),
    "lora fsdp2 x2": (2, [*TUNE, "strategy=fsdp2", "B=4", "G=8"]),
    "qlora fsdp2 x2": (2, [*TUNE, "peft=qlora", "strategy=fsdp2", "B=4", "G=8"]),
    "llama zero1 x2": (2, [*LLAMA, "strategy=zero1", "B=4", "G=8"]),
    "llama zero2 x2": (2, [*LLAMA, "strategy=zero2", "B=4", "G=8"]),
    "llama zero2 x2, accumulation 2": (2, [*LLAMA, "strategy=zero2", "B=2", "G=8"]),
    "llama zero3 x2": (2, [*LLAMA, "strategy=zero3", "B=4", "G=8"]),
    "llama zero3 x2, checkpointing": (
        2,
        [*LLAMA, "strategy=zero3", "B=4", "G=8", "strategy.activation_checkpointing=1"],
    ),
    "llama zero3 x3": (3, [*LLAMA, "strategy=zero3", "B=4", "G=12"]),
    "vit zero2 x2": (2, [*VIT, "strategy=zero2", "B=16", "G=32"]),
    "lora zero2 x2": (2, [*TUNE, "strategy=zero2", "B=4", "G=8"]),
    "lora zero3 x2": (2, [*TUNE, "strategy=zero3", "B=4", "G=8"]),
}
LONG = {"B": "strategy.micro_batch_size", "G": "train.global_batch_size"}


def spelled(texts: list[str], pretrained: Path) -> list[str]:
    """A configuration as typed on a command line; the loss is plain where it does not say otherwise."""
    words = [text.replace("{pretrained}", str(pretrained)) for text in texts]
    words = [f"{LONG[w.partition('=')[0]]}={w.partition('=')[2]}" if w.partition("=")[0] in LONG else w for w in words]
    chunked = [] if any("chunked_loss" in w for w in words) else ["strategy.chunked_loss=false"]
    return [*words, *chunked]


def overrides(ranks: int, texts: list[str], pretrained: Path) -> list[str]:
    """What is run here."""
    return [*spelled(texts, pretrained), "hardware=cpu", f"hardware.devices_per_node={ranks}", "train.precision=fp32",
            "optim.warmup_steps=0", "strategy.persistence_threshold=0", "strategy.bucket_mb=25"]  # fmt: skip


def pretrained_model(directory: Path) -> Path:
    """A Llama of 30 M parameters, its weights drawn here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                         max_position_embeddings=512, tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def two_steps(cfg: Any) -> None:
    """Build the engine as a run would, and take it through two steps."""
    from train import models, optim, strategy, tasks
    from train.data import Prepared
    from train.plan.subject import Subject

    subject = Subject(cfg)
    procs = strategy.start(cfg)
    task = tasks.TASKS[cfg.task.name](cfg, Prepared(cfg.data.kind, Path(), {}, subject.facts))
    with models.parameters_on_meta():
        module = task.build_model()
    engine = strategy.build(cfg, procs, strategy.precision_of(cfg, procs.device))
    engine.prepare(module, models.initial_values(module, 0), models.blocks(module),
                   lambda named: optim.build(named, cfg, device_type=procs.device.type))  # fmt: skip
    micro = strategy.micro_steps(cfg, procs.world_size, engine.micro_batch_size)
    for _ in range(2):
        for i in range(micro):
            batch = {k: v.to(procs.device) for k, v in subject.batch(engine.micro_batch_size).items()}
            if "image" in batch:
                batch["image"].normal_()
            with models.keyed(engine.module, batch, 0), engine.micro_step(last=i == micro - 1):
                loss, _ = task.loss(engine.model, batch)
                engine.backward(loss * (engine.scale / 1000))
            del loss
        engine.step(1e-4)
        engine.take_loss()
    engine.close()


def peak_of(words: list[str]) -> float:
    """Bytes at the peak of two steps on this rank."""
    from benchmarks.allocator import peak_bytes
    from train import config

    cfg = config.compose(words)
    mapped = {f.stat().st_size for f in Path(cfg.model.path or "nowhere").glob("*.safetensors")}
    return float(peak_bytes(lambda: two_steps(cfg), mapped))


def worker(words: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        found: Any = peak_of(words)
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
    print("PEAK " + json.dumps(found), flush=True)
    os._exit(0)


def measured(ranks: int, words: list[str]) -> Any:
    """The highest peak over ranks, or what went wrong. In processes of its own: what an engine before it left behind, and
    frees late, would be taken off the peak."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
               "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "WANDB_MODE": "disabled"}  # fmt: skip
        command = [sys.executable, __file__, "--worker", json.dumps(words)]
        processes.append(
            subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
    found: list[Any] = []
    for process in processes:
        out, _ = process.communicate()
        found.append(next((json.loads(x[5:]) for x in out.splitlines() if x.startswith("PEAK ")), "the rank died"))
    return next((x for x in found if isinstance(x, str)), None) or max(found)


LEAST = 200 * 2**20  # bytes of a peak that counts


def page(rows: list[dict[str, Any]]) -> str:
    """A table and what it comes to."""
    out = ["| configuration | measured, MiB | predicted, MiB | error | the plan's moment |", "|---|---|---|---|---|"]
    for r in rows:
        predicted = f"{r['predicted'] / 2**20:.1f}"
        if r["error"] is None:
            out.append(f"| {r['name']} | {r['measured']} | {predicted} | | |")
        else:
            error = f"{r['error']:+.1%}" + ("" if r["measured"] >= LEAST else " (not counted)")
            out.append(f"| {r['name']} | {r['measured'] / 2**20:.1f} | {predicted} | {error} | {r['moment']} |")
    return "\n".join([*out, "", verdict(rows)])


def verdict(rows: list[dict[str, Any]]) -> str:
    counted = [r["error"] for r in rows if r["error"] is not None and r["measured"] >= LEAST]
    if not counted:
        return "nothing to count"
    sizes = [abs(e) for e in counted]
    return (
        f"{len(counted)} configurations: median {statistics.median(sizes):.1%}, highest {max(sizes):.1%}, "
        f"mean with its sign {statistics.fmean(counted):+.1%}"
    )


def run(options: argparse.Namespace, peaks: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table. peaks: what was measured before; where there is any, only that is shown."""
    from train import config
    from train import plan as planner

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        pretrained = pretrained_model(Path(directory) / "model")
        chosen = {n: (r, overrides(r, o, pretrained)) for n, (r, o) in CONFIGS.items() if options.only in n}
        for ranks in (1, 2, 3):
            mine = {n: o for n, (r, o) in chosen.items() if r == ranks}
            for name, words in mine.items():
                if peaks and name not in peaks:
                    continue
                peak = peaks[name] if peaks else measured(ranks, words)
                best = planner.plan(config.compose(words))
                predicted = best.allocated_gib * 2**30
                error = predicted / peak - 1 if isinstance(peak, float) else None
                rows.append({"name": name, "measured": peak, "predicted": predicted, "error": error, "moment": best.moment,
                             "terms_mib": {k: round(v * 1024, 1) for k, v in best.memory_gib.items()}})  # fmt: skip
                if not options.json and not options.markdown:
                    shown = f"{peak / 2**20:8.1f}" if error is not None else f"  {peak}"
                    print(f"{name:36s} measured {shown} MiB  predicted {predicted / 2**20:8.1f} MiB"
                          + (f"  {error:+6.1%}" if error is not None else ""), flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="what --json printed; measures nothing")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on stdout that it found no other
    texts = [file.read_text() for file in options.merge]
    rows = run(
        options, {row["name"]: row["measured"] for text in texts for row in json.loads(text[text.find("[\n") :])}
    )
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(page(rows) if options.markdown else verdict(rows))


if __name__ == "__main__":
    main()
