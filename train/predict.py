"""A trained model, put together from its run directory, and what it says about files.

Owns: `open_trained` (one process, no engine: `checkpoint.py`'s reader with one rank) and `predict`.

Does not own: what a prediction is and how it is written (the task's `predict_files`), other forms of the weights
(`export.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train import checkpoint, config, data, models, order, rundir, tasks
from train.checkpoint import CheckpointError
from train.rundir import RunDir, RunError

if TYPE_CHECKING:
    from torch import nn

    from train.config import Config
    from train.tasks import Task

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Trained:
    """A run, opened for use."""

    run: RunDir
    cfg: Config
    prepared: data.Prepared
    task: Task
    model: nn.Module
    """In evaluation mode, with the weights of `step` (their moving average, where the run has one)."""
    step: int

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute as the run did when it evaluated."""
        dtype = _PRECISIONS.get(self.cfg.train.precision)
        device = next(self.model.parameters()).device.type
        return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def open_trained(run_dir: str | Path, step: str | int = "best", *, overrides: Sequence[str] = (), held_out: bool = False,
                 full_precision: bool = False, say: Callable[[str], None] = print) -> Trained:  # fmt: skip
    """The model of a run at `step` (`best`, `last` or a number).

    Needs the run directory, and the base model where only a part was trained; the data only if `held_out` is asked for.
    full_precision: fp32 on the CPU, and what QLoRA quantised as it was before; else on the GPU, if there is one, and as
    the run computed. Raises RunError, ConfigError, DataError, ModelError, CheckpointError.
    """
    run = RunDir(run_dir)
    if not run.data.is_file():
        raise RunError(
            f"{run.path} is not the directory of a run that has started: it has no data.json. `gearshift status` lists "
            "runs.",
            rundir.EXIT_CONFIG,
        )
    cfg = config.load(run.path, overrides)
    if full_precision:
        cfg.train.precision, cfg.hardware.device = "fp32", "cpu"
        cfg.peft.name = "lora" if cfg.peft.name == "qlora" else cfg.peft.name
    path = checkpoint.find(run, step)
    chosen = int(path.name.removeprefix("step-"))
    masters = checkpoint.read_masters(run.path, chosen)
    prepared = _prepared(run, cfg, held_out=held_out, say=say)
    task = tasks.TASKS[cfg.task.name](cfg, prepared)
    with models.parameters_on_meta():
        model: Any = task.build_model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if wrong := {
        n for n in {*shapes, *masters} if n not in shapes or n not in masters or masters[n].shape != shapes[n]
    }:
        raise CheckpointError(
            f"{path} holds the weights of another model than {run.config} describes: {sorted(wrong)[:5]} differ."
        )
    brought = getattr(model, "starting_weights", None) or (lambda name: None)
    model.starting_weights = lambda name: masters[name] if name in masters else brought(name)
    models.initialise(model, cfg.seed)
    device = "cuda" if cfg.hardware.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    return Trained(run, cfg, prepared, task, model.to(device).eval(), chosen)


def _prepared(run: RunDir, cfg: Config, *, held_out: bool, say: Callable[[str], None]) -> data.Prepared:
    """What the run knew of its data, with the data itself if it is asked for."""
    facts = json.loads(run.data.read_text())
    info = {**facts["info"], **({"tokenizer": str(run.tokenizer)} if run.tokenizer.is_dir() else {})}
    if not held_out:
        return data.Prepared(facts["kind"], run.path, facts["fingerprints"], info)
    prepared = data.prepare(cfg, say)
    if changes := config.diff(facts["fingerprints"], prepared.fingerprints):
        raise data.DataError(
            f"What is held out is not what {run.path.name} held out, because its data has changed:\n  "
            + "\n  ".join(changes)
            + f"\nGive what to predict: gearshift predict {run.path} INPUT --to DIR"
        )
    return replace(prepared, info={**prepared.info, **{k: v for k, v in info.items() if k == "tokenizer"}})


def predict(run_dir: str | Path, source: str | Path | None, to: str | Path, *, step: str | int = "best",
            overrides: Sequence[str] = (), say: Callable[[str], None] = print) -> dict[str, float]:  # fmt: skip
    """Predictions for a file or folder, or (None) for what the run held out, as files in the directory `to`.

    Returns the metrics, and writes them as `metrics.json`, where the true answers are there; for what the run held out
    they are the figures of its own evaluation at that step. Raises what `open_trained` raises.
    """
    target = Path(to)
    trained = open_trained(run_dir, step, overrides=overrides, held_out=source is None, say=say)
    with trained.autocast(), torch.no_grad():
        metrics = trained.task.predict_files(
            trained.model, None if source is None else Path(source).expanduser(), target, say
        )
        if source is None and not metrics:
            metrics = _evaluate(trained)
    if metrics:
        rundir.atomic_write(target / "metrics.json", rundir.to_json({"step": trained.step, **metrics}, indent=2) + "\n")
    return metrics


def _evaluate(trained: Trained) -> dict[str, float]:
    """The run's evaluation again, on one process."""
    from train.data.loader import Loader

    engine = (trained.run.result() or {}).get("engine") or {}
    device = next(trained.model.parameters()).device
    sets, held_out = data.open_datasets(trained.prepared, trained.cfg)
    loader = Loader(sets, order.Order([len(s) for s in sets], data.weights(trained.cfg), 1, 0), rank=0, world_size=1,
                    micro_batch_size=engine.get("micro_batch_size") or 1, seed=trained.cfg.seed, device=device,
                    workers=trained.cfg.data.workers)  # fmt: skip
    try:
        batches = loader.eval_batches(held_out, trained.cfg.eval.max_samples)
        return trained.task.evaluate(trained.model, batches, lambda tensor: tensor)
    finally:
        loader.close()
