"""Fine-tuning a real model, by its own numbers: SmolLM2-135M-Instruct on docstrings, with LoRA and with QLoRA.

    make smollm2                        brings the model
    python benchmarks/finetune.py       two trainings of 30 steps and their exports: about ten minutes on two idle cores

Writes benchmarks/results/finetune_<date>.md: held-out loss of the model as it comes and after each training, on the same
rows; what was trained; the gradient norm after an evaluation (two traps of 4-bit training on a CPU show there only);
what an export says when plain transformers loads it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FORMS = ("lora", "qlora")


def trained(root: Path, name: str, form: str, overrides: list[str]) -> dict[str, Any]:
    """The numbers of the run `name`, which is trained unless it is finished already."""
    command = [sys.executable, "-m", "train", "experiment=finetune_smollm2", f"peft={form}", "hardware=cpu", "tracker=none",
               "log.every=1", f"run.root={root}", f"run.name={name}", *overrides]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((root / name / "result.json").read_text())
    return {
        "loss": result["eval"]["eval_loss"],
        "step_s": result["measured"].get("step_s"),
        "memory_gib": result["measured"].get("peak_memory_gib"),
        "steps": result["steps"],
    }


def opened(root: Path, form: str) -> dict[str, Any]:
    """What is trained; the held-out loss without the adapters, which is the model as it comes, and with them over the
    model in full precision, which is what an export holds."""
    import torch

    from train import predict

    trained = predict.open_trained(root / form, "last")
    counts = [(p.requires_grad, ".lora_" in name, p.numel()) for name, p in trained.model.named_parameters()]
    assert all(trains == adapter for trains, adapter, _ in counts)
    run = predict.open_trained(root / form, "last", held_out=True, full_precision=True, say=lambda _: None)
    model: Any = run.model
    with torch.no_grad():
        served = predict._evaluate(run)["eval_loss"]
        with model.disable_adapter():
            before = predict._evaluate(run)["eval_loss"]
    return {"adapters": sum(n for trains, _, n in counts if trains), "before": before, "served": served}


def exported(root: Path, form: str) -> dict[str, Any]:
    from train.export import export

    target = root / f"{form}-merged"
    if (target / "export.json").is_file():
        return json.loads((target / "export.json").read_text())
    return export(root / form, target, step="last", merge=True)


def gradient_norms(root: Path, overrides: list[str]) -> list[tuple[float, float]]:
    """QLoRA's gradient norms of four steps: plain, and with an evaluation after every second one."""
    rows = []
    for name, every in (("plain", "null"), ("watched", "2")):
        short = ["train.max_steps=4", f"eval.every={every}", "eval.max_samples=2", "eval.samples=0"]
        trained(root, name, "qlora", [*overrides, *short])
        lines = (root / name / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line)["grad_norm"] for line in lines])
    return list(zip(*rows, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="keeps runs and exports there, and goes on from what is there")
    parser.add_argument("overrides", nargs="*", help="of the training")
    options = parser.parse_args()
    root = (options.root or Path(tempfile.mkdtemp(prefix="finetune-"))).resolve()
    found = {}
    for form in FORMS:
        found[form] = trained(root, form, form, options.overrides)
        found[form] |= opened(root, form) | exported(root, form)
    import torch
    import transformers

    now = datetime.datetime.now()
    base, lora, qlora = found["lora"]["before"], found["lora"]["loss"], found["qlora"]["loss"]
    served = found["qlora"]["served"]
    lines = [
        f"# Fine-tuning SmolLM2-135M-Instruct, {now:%Y-%m-%d}",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"`{' '.join(['python benchmarks/finetune.py', *options.overrides])}`",
        "",
        f"{found['lora']['steps']} steps. Held-out loss (nats per token of docstrings, same rows): {base:.4f} as it comes, "
        f"{lora:.4f} with LoRA ({lora - base:+.4f}), {qlora:.4f} with QLoRA ({qlora / lora - 1:+.2%} of LoRA's), which is "
        f"{served:.4f} ({served / lora - 1:+.2%}) once its adapters are merged into the base in full precision.",
        "",
        "| | held-out, before | trained | exported | trained parameters | s a step | peak GiB | logits, merged against run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for form, v in found.items():
        lines.append(
            f"| {form} | {v['before']:.4f} | {v['loss']:.4f} | {v['served']:.4f} | {v['adapters']:,} | {v['step_s']:.2f} | "
            f"{v['memory_gib']:.2f} | {v['max_difference']:.1e} |"
        )
    norms = gradient_norms(root, options.overrides)
    told = ", ".join(f"{a:.6f} / {b:.6f}" for a, b in norms)
    lines += ["", f"QLoRA's gradient norm, step by step, without / with an evaluation after step 2: {told}."]
    answer = found["lora"]["answer"]
    lines += [
        "",
        "What the merged LoRA answers in plain transformers:",
        "",
        "```text",
        answer["prompt"],
        "---",
        answer["text"],
        "```",
    ]
    target = ROOT / "benchmarks" / "results" / f"finetune_{now:%Y-%m-%d}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
