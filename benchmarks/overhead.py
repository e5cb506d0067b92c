"""What the harness costs: the same training through six loops, interleaved in one run.

    python benchmarks/overhead.py                    all contenders, both sizes; writes benchmarks/results/overhead_<date>.md
    python benchmarks/overhead.py --sizes small --blocks 3

Every contender trains the same Llama from the same weights on the same rows in the same order, with the same AdamW, clip and
learning rate, in a process of its own; the final losses are asserted equal. Processes take turns: each runs a block of
steps and then waits, so that a noisy machine is noisy for all of them alike. A step is timed from one optimizer step to the
next, so everything that a loop does between two steps counts.

    raw          the loop that one writes by hand
    accelerate   Accelerate's plain loop: prepare, backward, clip_grad_norm_
    trainer      Hugging Face Trainer, logging every 10 steps
    lightning    Lightning Trainer, logging every 10 steps, no checkpoints
    ours         `python -m train`, tracker=none
    ours+all     `python -m train` with W&B (offline), TensorBoard, ledger, asynchronous checkpoints every 50 steps
    ours+best    `python -m train`, tracker=none, with the fastest settings that this CPU has (`BEST`)

The first tables compare loops, so all run on one thread and none gives freed memory back to the kernel (glibc does, and
faults it in again: a coin toss per process that is worth more than any loop). The last table, `best`, compares what a
user gets: the raw loop as it is written, in eager fp32 on every core, with ours at its best.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "small": ["model.hidden_size=64", "model.num_layers=2", "model.num_heads=2", "data.seq_len=64"],
    "mid": ["model.hidden_size=192", "model.num_layers=4", "model.num_heads=4", "data.seq_len=128"],
}
CONTENDERS = ("raw", "accelerate", "trainer", "lightning", "ours", "ours+all")
BEST = ["strategy.compile=true"]  # bf16 too where the CPU has it natively: this is what train.precision=auto decides
SAME_ALLOCATOR = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
LR, CLIP = 1e-3, 1.0


def overrides(size: str, steps: int) -> list[str]:
    return [
        "experiment=lm_stdlib",
        "hardware=cpu",
        "train.precision=fp32",
        f"train.max_steps={steps}",
        "train.global_batch_size=8",
        "strategy.micro_batch_size=8",
        f"optim.lr={LR}",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        f"optim.clip={CLIP}",
        "eval.every=null",
        "eval.max_samples=8",
        "eval.samples=0",
        "log.every=10",
        *SIZES[size],
    ]


# -- one contender, in its own process ---------------------------------------------------------------------------------


class Turns:
    """Tells the parent about blocks of steps, and waits for its turn between them."""

    def __init__(self, steps: int, block: int) -> None:
        self.steps, self.block, self.done = steps, block, 0
        self.wall: list[float] = []
        self.eval_loss: float | None = None

    def step(self) -> None:
        """Called once per step, at the same point of every loop."""
        now = time.perf_counter()
        if self.done == 1:
            self._say({"first": time.time()})
        if self.done > 1:
            self.wall.append(now - self._last)
        if self.done and self.done % self.block == 0:
            self._say({"wall": self.wall})
            self.wall = []
        self.done += 1
        self._last = time.perf_counter()

    def end(self, loss: float) -> None:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"loss": loss, "peak_gib": rss, "eval_loss": self.eval_loss}), flush=True)
        sys.stdin.readline()
        os._exit(0)

    def _say(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)
        sys.stdin.readline()  # the parent's word to go on


def shared(size: str, steps: int) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """The model with its starting values, the batches of every step, and the batch that is evaluated: what all
    hand-written loops train on."""
    import torch
    from torch import nn

    from train import config, data, models, order, tasks
    from train.data.loader import Loader

    cfg = config.compose(overrides(size, steps))
    prepared = data.prepare(cfg, lambda _: None)
    task = tasks.TASKS["causal_lm"](cfg, prepared)
    model = models.initialise(task.build_model(), cfg.seed)
    sets, held_out = data.open_datasets(prepared, cfg)
    sequence = order.Order([len(s) for s in sets], [1.0], 8, cfg.seed)
    loader = Loader(sets, sequence, rank=0, world_size=1, micro_batch_size=8, seed=0, device="cpu", workers=1)
    batches = [{k: loader.micro_batches(s)[0][k] for k in ("input_ids", "labels")} for s in range(steps)]
    found = next(iter(loader.eval_batches(held_out, 8)))
    evaluated = {k: found[k] for k in ("input_ids", "labels")}
    loader.close()

    class WithLoss(nn.Module):
        """Mean cross-entropy of pre-shifted labels, so that every contender computes the same thing."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.model(input_ids=input_ids, use_cache=False).logits.float()
            return {"loss": nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))}

    return WithLoss(), batches, evaluated


def groups(module: Any) -> list[dict[str, Any]]:
    named = list(module.named_parameters())
    return [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(module: Any) -> Any:
    import torch

    return torch.optim.AdamW(groups(module), lr=LR, betas=(0.9, 0.95), eps=1e-8)


def raw(size: str, turns: Turns) -> float:
    import torch

    module, batches, evaluated = shared(size, turns.steps)
    optimizer = adamw(module)
    for batch in batches:
        turns.step()
        loss = module(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        turns.eval_loss = float(module(**evaluated)["loss"])
    return float(loss.detach())


def accelerate(size: str, turns: Turns) -> float:
    from accelerate import Accelerator

    module, batches, _ = shared(size, turns.steps)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    module, optimizer = accelerator.prepare(module, adamw(module))
    for batch in batches:
        turns.step()
        loss = module(**batch)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def rows(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(8)]


def trainer(size: str, turns: Turns) -> float:
    import torch
    import transformers

    module, batches, _ = shared(size, turns.steps)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.step()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *a: Any, **k: Any) -> Any:
            self.last = super().training_step(*a, **k)
            return self.last

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        max_steps=turns.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )
    loop = InOrder(
        model=module, args=arguments, train_dataset=rows(batches), optimizers=(adamw(module), None), callbacks=[Clock()]
    )
    loop.model_accepts_loss_kwargs = False
    loop.train()
    return float(loop.last)


def lightning(size: str, turns: Turns) -> float:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    import lightning as L
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, batches, _ = shared(size, turns.steps)

    class Wrapped(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def training_step(self, batch: Any, _: int) -> Any:
            self.last = self.module(**batch)["loss"]
            self.log("loss", self.last)
            return self.last

        def configure_optimizers(self) -> Any:
            return adamw(self.module)

    class Clock(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            turns.step()

    loop = L.Trainer(
        accelerator="cpu",
        max_steps=turns.steps,
        gradient_clip_val=CLIP,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=L.pytorch.loggers.CSVLogger(tempfile.mkdtemp()),
        log_every_n_steps=10,
        callbacks=[Clock()],
    )
    wrapped = Wrapped()
    loop.fit(wrapped, torch.utils.data.DataLoader(rows(batches), batch_size=8, shuffle=False))
    return float(wrapped.last)


def ours(size: str, turns: Turns, *more: str) -> float:
    from train import config, lifecycle, optim
    from train.main import train

    where = tempfile.mkdtemp()
    schedule: Callable[..., float] = optim.lr

    def clocked(*arguments: Any) -> float:  # the script asks for the learning rate once a step
        turns.step()
        return schedule(*arguments)

    optim.lr = clocked
    sys.stdout, out = io.StringIO(), sys.stdout
    train_turns = turns._say

    def say(message: dict[str, Any]) -> None:
        sys.stdout, quiet = out, sys.stdout
        train_turns(message)
        sys.stdout = quiet

    turns._say = say  # type: ignore[method-assign]
    train(
        config.compose([*overrides(size, turns.steps), f"run.root={where}", "run.name=ours", *more]),
        lifecycle.Request(),
    )
    sys.stdout = out
    last = [json.loads(line) for line in (Path(where) / "ours" / "metrics.jsonl").read_text().splitlines()][-1]
    shutil.rmtree(where, ignore_errors=True)
    turns.eval_loss = last["eval_loss"]
    return last["loss"]


LOOPS: dict[str, Callable[[str, Turns], float]] = {
    "raw": raw,
    "accelerate": accelerate,
    "trainer": trainer,
    "lightning": lightning,
    "ours": lambda size, turns: ours(size, turns, "tracker=none"),
    "ours+all": lambda size, turns: ours(size, turns, "tracker=[wandb,tensorboard]", "checkpoint.every=50"),
    "ours+best": lambda size, turns: ours(size, turns, "tracker=none", *BEST),
}


# -- the parent --------------------------------------------------------------------------------------------------------


def measure(
    size: str, names: list[str], *, blocks: int, block: int, environment: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Start the contenders one after the other, then let them take turns."""
    env = {
        **{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        **environment,
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }
    running: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, dict[str, Any]] = {name: {"wall": []} for name in names}

    def hear(name: str) -> dict[str, Any]:
        for line in running[name].stdout or ():
            if line.startswith('{"'):
                return json.loads(line)
        raise RuntimeError(f"{name} ended early")

    def go(name: str) -> None:
        pipe = running[name].stdin
        assert pipe is not None
        pipe.write("\n")
        pipe.flush()

    for name in names:
        began = time.time()
        command = [
            sys.executable,
            __file__,
            "--contender",
            name,
            "--sizes",
            size,
            "--blocks",
            str(blocks),
            "--block",
            str(block),
        ]
        running[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )
        found[name]["first_step_s"] = hear(name)["first"] - began
    for _ in range(blocks):
        for name in names:
            go(name)
            found[name]["wall"].append(hear(name)["wall"])
    for name in names:
        go(name)
        found[name].update(hear(name))
        go(name)
        running[name].wait(timeout=60)
    return found


def table(size: str, found: dict[str, dict[str, Any]], *, best: bool = False) -> Iterator[str]:
    key, bound = ("eval_loss", 1e-2) if best else ("loss", 1e-4)
    wanted = found["raw"][key]
    for name, values in found.items():
        assert abs(values[key] - wanted) <= bound * abs(wanted), (
            f"{name} trained something else: {values[key]} {wanted}"
        )
    tokens = 8 * int(next(o for o in SIZES[size] if "seq_len" in o).split("=")[1])
    # Differences block by block: contenders of one round ran within seconds of each other.
    per_round = {n: [statistics.median(w) * 1e3 for w in v["wall"] if w] for n, v in found.items()}
    base = per_round["raw"]
    what = f"best of our settings ({' '.join(BEST)}) on {size}" if best else size
    yield f"\n### {what}: {' '.join(SIZES[size])}\n"
    yield (
        "| loop | ms a step | extra ms over raw, median of rounds | to first step, s | peak RSS, GiB | tokens/s | "
        f"{'validation' if best else 'final'} loss |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, values in found.items():
        extra = statistics.median(b - a for a, b in zip(base, per_round[name], strict=True))
        ms = statistics.median(per_round[name])
        yield (
            f"| {name} | {ms:.2f} | {extra:+.2f} | {values['first_step_s']:.1f} | {values['peak_gib']:.2f} | "
            f"{tokens / ms * 1e3:,.0f} | {values[key]:.6f} |"
        )
    if best:
        ratio = statistics.median(a / b for a, b in zip(base, per_round["ours+best"], strict=True))
        yield f"\nTokens/s of ours+best over raw, median of rounds: {ratio:.2f} x."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--best", nargs="*", default=["mid"], choices=list(SIZES), help="sizes of the last table")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block", type=int, default=25)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        turns = Turns(options.blocks * options.block + 1, options.block)
        turns.end(LOOPS[options.contender](options.sizes[0], turns))
    import torch
    import transformers

    now = datetime.datetime.now()
    lines = [
        f"# Overhead, {now:%Y-%m-%d}",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"`python benchmarks/overhead.py {' '.join(sys.argv[1:])}`",
    ]
    for best, size in [*((False, size) for size in options.sizes), *((True, size) for size in options.best)]:
        names, environment = (["raw", "ours+best"], {}) if best else (options.contenders, SAME_ALLOCATOR)
        found = measure(size, names, blocks=options.blocks, block=options.block, environment=environment)
        for line in table(size, found, best=best):
            lines.append(line)
            print(line, flush=True)
    target = ROOT / "benchmarks" / "results" / f"overhead_{now:%Y-%m-%d}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    print(f"\nwritten to {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
