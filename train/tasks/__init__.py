"""What is learned from samples: the kinds of task, and the interface through which everything else uses them.

Owns: `Task`, the whole of what the script, the planner, `predict` and `export` know about a task, and `TASKS`.

Does not own: any one task (`causal_lm.py`, `classify.py`, `segment.py`), the models (`train/models`), the samples
(`train/data`). A task never divides a loss, never synchronises ranks except through the `reduce` it is given, and never
knows which strategy runs it.

A plug-in adds a task with `TASKS["mine"] = factory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.config import Config
    from train.data import Prepared

    Batch = dict[str, Tensor]


class Task(Protocol):
    """A task over batches, which are dicts of tensors whose leading dimension is the micro-batch.

    `model` is whatever the strategy made of the module from `build_model` (wrapped, sharded): a task calls it and looks
    at nothing inside. Rows whose `weight` is 0 are padding and count for nothing.
    """

    @property
    def objective(self) -> str:
        """The metric of `evaluate` that runs are compared by unless `eval.metric` names another."""
        ...

    @property
    def directions(self) -> dict[str, bool]:
        """Metric of `evaluate` -> whether higher is better. Holds every name that `eval.metric` may have."""
        ...

    def build_model(self) -> nn.Module:
        """The module, its parameters on meta: `models.initial_values` says what they hold. Raises models.ModelError."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """int64 scalar: the tokens, pixels or samples of this micro-batch that carry loss. No forward."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the loss over everything that carries it, fp32 scalar with a graph; the same count as `count`).

        Where nothing carries loss: a finite 0 whose gradients are 0.
        """
        ...

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Metrics over `batches` of all ranks, each name beginning with `eval_`; leaves `model` in the mode it was in.

        One forward per batch, so ranks with equally many batches stay together. `reduce` sums a tensor over ranks.
        """
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """What the model says, one entry per row of weight 1."""
        ...

    def predict_files(
        self, model: nn.Module, source: Path | None, directory: Path, say: Callable[[str], None] = print
    ) -> dict[str, float]:
        """Predict for a file or folder, or (None) for the held-out data, and write the answers as files into `directory`.

        Returns metrics where the true answers are there. Raises data.DataError.
        """
        ...

    def sample(self, model: nn.Module, step: int, directory: Path | None) -> None:
        """Make the predictions that people look at, and write them as files into `directory`.

        Every rank calls it and makes the same forwards; only the main process gives a directory.
        """
        ...


Factory = Callable[["Config", "Prepared"], Task]


def _later(module: str, name: str) -> Factory:
    """A task whose module, and torch behind it, is imported when it is used."""
    return lambda cfg, prepared: getattr(import_module(f"train.tasks.{module}"), name)(cfg, prepared)


TASKS: dict[str, Factory] = {
    "causal_lm": _later("causal_lm", "CausalLM"),
    "classify": _later("classify", "Classify"),
    "segment": _later("segment", "Segment"),
}
"""Name of a task -> a function of (config, what `prepare` left). Importing this imports no torch."""
