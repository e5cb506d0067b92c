"""A plan put to use: the layout that a run takes, and those that it may take instead. Imports no torch itself.

Owns: `choose` (from a config on its machine to the layout that is settled), `on_ranks` (that machine, as a launcher laid it
out), what `plan.json` holds, the lighter layouts for a run that is out of memory, what is kept of prepared data for the
plans of later commands, and everything that an engine would be told, as text.

Does not own: what is predicted (`search.py`), starting anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import rundir
from train.config import to_dict
from train.data import cache
from train.plan import machines
from train.plan.search import Plan, changes, search
from train.plan.show import render
from train.plan.subject import NoTrace

if TYPE_CHECKING:
    from train.config import Config, StrategyConfig

LIGHTER = 0.95  # of the memory of a layout that failed: less is a real difference


class DoesNotFit(rundir.RunError):
    """No layout fits, and `run.fit` is `error`. The message has the plan, what binds, and what would fit."""

    def __init__(self, text: str, nearest: Plan) -> None:
        super().__init__(text, rundir.EXIT_FIT)
        self.nearest = nearest


@dataclass(frozen=True)
class Choice:
    """The layout of a run."""

    strategy: StrategyConfig
    """With every lever settled; as it was asked where nothing could be planned."""
    plan: Plan | None
    lighter: tuple[Plan, ...] = ()
    """Layouts that fit as well, the next less memory each."""
    note: str = ""
    """Why there is no plan."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `plan.json`."""
        planned = {} if self.plan is None else self.plan.to_dict()
        return {**planned, "note": self.note, "lighter": [settings(p) for p in self.lighter]}


def on_ranks(cfg: Config, *, world_size: int, local_world_size: int, device: str) -> Config:
    """`cfg` on the machine as a launcher laid it out, whatever `hardware` leaves open or says otherwise."""
    nodes = max(1, world_size // local_world_size)
    found = replace(cfg.hardware, device=device, devices_per_node=local_world_size, nodes=str(nodes))  # type: ignore[arg-type]
    return replace(cfg, hardware=found)


def choose(cfg: Config, info: Mapping[str, Any], *, take: bool = True) -> Choice:
    """The first layout of the plan for `cfg`, or none with a note where none can be made.

    take: whether a trace may be taken where none is at hand, which loads torch. Raises DoesNotFit, unless `run.fit=warn`.
    """
    try:
        plans = search(cfg, info, take=take)
    except NoTrace:
        return Choice(
            cfg.strategy, None, note="not planned: no trace of this model is at hand (`gearshift plan` takes one)"
        )
    except Exception as error:  # a plug-in's model may do what no trace can follow; it can be trained all the same
        return Choice(cfg.strategy, None, note=f"not planned: {type(error).__name__}: {error}")
    best = plans[0]
    if not best.fits and cfg.run.fit == "error":
        text = render(plans, changes(cfg, info)) + "\nTo start it all the same: run.fit=warn"
        raise DoesNotFit(text, best)
    if cfg.strategy.micro_batch_size is not None:  # a lighter one may have less of everything that was set
        plans = search(replace(cfg, strategy=replace(cfg.strategy, micro_batch_size=None)), info, take=take)
    lighter, bound = [], best.peak_memory_gib
    while found := next((p for p in plans if p.fits and p.peak_memory_gib < LIGHTER * bound), None):
        lighter.append(found)
        bound = found.peak_memory_gib
    return Choice(settled(cfg, best), best, tuple(lighter))


def settled(cfg: Config, plan: Plan) -> StrategyConfig:
    """`cfg.strategy` with the levers of `plan`."""
    chunked = plan.chunked_loss if cfg.task.name == "causal_lm" else cfg.strategy.chunked_loss
    levers = ("micro_batch_size", "activation_checkpointing", "compile", "offload", "offload_parameters")
    planned = {lever: getattr(plan, lever) for lever in levers}
    return replace(cfg.strategy, name=plan.strategy, chunked_loss=chunked, **planned)  # type: ignore[arg-type]


def settings(plan: Plan) -> list[str]:
    """Overrides for exactly this layout, which leave every other setting of `strategy` alone."""
    flags = {"compile": plan.compile, "offload_parameters": plan.offload_parameters}
    levers = {"name": plan.strategy, "chunked_loss": "true" if plan.chunked_loss else "null", "offload": plan.offload}
    levers |= {lever: str(value).lower() for lever, value in flags.items()}
    levers |= {lever: str(getattr(plan, lever)) for lever in ("micro_batch_size", "activation_checkpointing")}
    return [f"strategy.{lever}={value}" for lever, value in levers.items()]


def engine_settings(cfg: Config, plan: Plan) -> str:
    """What DeepSpeed would be told, as text; empty under the other engines, which are told what `cfg` says. Loads torch."""
    if not plan.strategy.startswith("zero"):
        return ""
    import torch

    from train.strategy import Processes
    from train.strategy.zero import Zero

    device = torch.device(machines.machine_of(cfg.hardware).device)
    laid = replace(cfg, strategy=settled(cfg, plan))
    engine = Zero(laid, plan.strategy, Processes(0, 0, plan.ranks, device), plan.precision)
    return json.dumps(engine.settings(), indent=2)


# ---- What is known of the data ---------------------------------------------------------------------------------------


def remember(cfg: Config, info: Mapping[str, Any]) -> None:
    """Keep what was counted in the data, so that a later plan need not assume it."""
    file = _kept(cfg)
    with suppress(OSError):  # a cache that cannot be written costs an assumption, not the run
        rundir.make_directory(file.parent)
        rundir.atomic_write(file, rundir.to_json(dict(info)))


def remembered(cfg: Config) -> dict[str, Any]:
    """What was counted when this data was last prepared; nothing if it never was."""
    with suppress(OSError, ValueError):
        return json.loads(_kept(cfg).read_text())
    return {}


def _kept(cfg: Config) -> Path:
    """By what was asked for, not by content, which only preparing would know."""
    asked = [{k: v for k, v in to_dict(cfg)["data"].items() if k != "workers"}, cfg.model.path, str(Path.cwd())]
    return cache.cache_root(cfg) / "counted" / f"{cache.fingerprint(asked)[:32]}.json"
