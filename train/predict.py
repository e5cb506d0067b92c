"""A trained model, put together from its run directory, and what it says about files.

Owns: `open_trained` (one process, no engine: `checkpoint.py`'s reader with one rank) and `predict`.

Does not own: what a prediction is and how it is written (the task's `predict_files`), other forms of the weights
(`export.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import checkpoint, config, data, models, tasks
from train.rundir import RunDir, RunError

if TYPE_CHECKING:
    from torch import nn

    from train.config import Config


@dataclass
class Trained:
    """A run, opened for use."""

    run: RunDir
    cfg: Config
    prepared: data.Prepared
    task: Any
    model: nn.Module
    """On the CPU or the GPU, weights of the chosen step, in evaluation mode."""
    step: int


def open_trained(run_dir: str | Path, step: str | int = "best", *, overrides: list[str] | None = None) -> Trained:
    """The model of a run at `step` (`best`, `last` or a number), its moving average where it has one.

    Needs the run directory, and the base model where only a part was trained; not the data. Raises RunError,
    CheckpointError, ConfigError, ModelError.
    """
    import torch

    run = RunDir(run_dir)
    if not run.data.is_file():
        raise RunError(f"{run.path} is not the directory of a run that has started: it holds no data.json.")
    cfg = config.load(run.path, overrides or [])
    facts = json.loads(run.data.read_text())
    info = {**facts["info"], **({"tokenizer": str(run.tokenizer)} if run.tokenizer.is_dir() else {})}
    try:  # where the data is at hand, so is what is held out
        prepared = data.prepare(cfg, lambda _: None)
        prepared.info.update(info)
    except data.DataError:
        prepared = data.Prepared(facts["kind"], run.path, facts["fingerprints"], info)
    task = tasks.TASKS[cfg.task.name](cfg, prepared)
    with models.parameters_on_meta():
        model = task.build_model()
    models.initialise(model, cfg.seed)
    chosen = _step(run, step)
    masters = checkpoint.read_masters(run.path, chosen)
    own = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(set(masters) - set(own))
    if unknown:
        raise checkpoint.CheckpointError(f"{run.path} holds weights that its model does not have: {unknown[:5]}")
    with torch.no_grad():
        for name, value in masters.items():
            own[name].copy_(value)
    device = "cuda" if torch.cuda.is_available() and cfg.hardware.device != "cpu" else "cpu"
    return Trained(run, cfg, prepared, task, model.to(device).eval(), chosen)


def _step(run: RunDir, step: str | int) -> int:
    """The number of the checkpoint that `best` (the last, where nothing was evaluated), `last` or a number means."""
    try:
        path = next(checkpoint.choose(run, step), None)
    except checkpoint.CheckpointError:
        if step != "best":
            raise
        path = next(checkpoint.choose(run, "last"), None)
    if path is None:
        raise checkpoint.CheckpointError(
            f"{run.path} has no checkpoint yet. Train it first: gearshift resume {run.path}"
        )
    return int(path.name.removeprefix("step-"))


def predict(run_dir: str | Path, source: str | Path | None, to: str | Path, *, step: str | int = "best",
            overrides: list[str] | None = None, say: Callable[[str], None] = print) -> dict[str, float]:  # fmt: skip
    """Predictions for a file or folder (None: the held-out data) as files in `to`; metrics where labels are there."""
    trained = open_trained(run_dir, step, overrides=overrides)
    return trained.task.predict_files(trained.model, None if source is None else Path(source), Path(to), say)
