"""What would run, before it runs: the `plan` verb, the refusal of what does not fit, everything of a dry run as text.

Owns: from words of a command to the experiment that is planned (or what remains of a run), on which machine a run that is
started from here will find itself, the rendering of config, layout, engine settings, command and environment.

Does not own: plans and their text (`train/plan`), what a command line is made of (`local.py`, `slurm.py`).
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import local, slurm
from train import config, rundir
from train.rundir import RunDir

if TYPE_CHECKING:
    from train.config import Config
    from train.plan.choose import Choice


@dataclass(frozen=True)
class Asked:
    """What is planned: an experiment, or what remains of a run."""

    cfg: Config
    info: dict[str, Any]
    run: RunDir
    title: str
    left: int | None = None
    """Steps that remain of a run."""


def ask(words: Sequence[str], *, plugin: str | None = None, config_dir: str | None = None) -> Asked:
    """words: overrides, or a run directory and overrides. Raises ConfigError, RunError."""
    from train.plan.choose import remembered
    from train.plan.search import length
    from train.plan.subject import Subject

    if not words or not (Path(words[0]) / "config.yaml").is_file():
        if words and "=" not in words[0]:
            raise config.ConfigError(
                [f"{words[0]} is neither a run directory (config.yaml) nor an override KEY=VALUE."]
            )
        cfg = config.compose(list(words), config_dir=config_dir, plugin=plugin)
        name = cfg.run.name or f"{cfg.experiment}-HASH"
        return Asked(cfg, remembered(cfg), RunDir(Path(cfg.run.root) / name), cfg.experiment)
    if plugin is not None:
        config.import_plugin(plugin)
    run = RunDir(words[0])
    cfg = config.load(run.path, words[1:])
    info = json.loads(run.data.read_text())["info"] if run.data.is_file() else remembered(cfg)
    done, (steps, _) = rundir.newest(run), length(Subject(cfg, info))
    if steps is None:
        return Asked(cfg, info, run, f"{run.path}, all of it: its length is not known")
    left = replace(cfg.train, max_steps=max(steps - done, 1), max_epochs=None, max_tokens=None)
    title = f"{run.path}: {done:,} of {steps:,} steps are done; what remains:"
    return Asked(replace(cfg, train=left), info, run, title, left=max(steps - done, 0))


def plan(asked: Asked, *, all_hardware: bool, as_json: bool) -> int:
    """Print the plan; the exit code, 3 where nothing fits."""
    from train import plan as planner

    if asked.left == 0:
        print(f"{asked.run.path}: nothing remains; all steps are done.")
        return rundir.EXIT_FINISHED
    if all_hardware:
        rows = planner.all_hardware(asked.cfg, asked.info)
        data: Any = [
            {"hardware": row.hardware, "plan": row.plan.to_dict(), "change": _change(row.change)} for row in rows
        ]
        print(rundir.to_json(data, indent=2) if as_json else planner.render_all(asked.title, rows))
        return rundir.EXIT_FINISHED if any(row.plan.fits for row in rows) else rundir.EXIT_FIT
    plans = planner.search(asked.cfg, asked.info)
    fits = plans[0].fits
    changes = [] if fits else planner.changes(asked.cfg, asked.info)
    if as_json:
        others = [p.to_dict() for p in plans[1:] if p.fits][:5]
        data = {"plan": plans[0].to_dict(), "others": others, "changes": [_change(change) for change in changes]}
        print(rundir.to_json(data, indent=2))
    else:
        print(f"{asked.title}\n\n{planner.render(plans, changes)}")
    return rundir.EXIT_FINISHED if fits else rundir.EXIT_FIT


def _change(change: Any) -> dict[str, Any] | None:
    return change and {"overrides": change.overrides, "learns": change.learns, "plan": change.plan.to_dict()}


def layout(cfg: Config, info: dict[str, Any], *, processes: int | None, dry: bool = False) -> Choice:
    """The layout of a run that starts with `processes` here, or on Slurm; as the ranks will choose it.

    On a CPU, where the ranks can plan sooner than this process could load torch, nothing is planned that has no trace yet,
    but for a `dry` run. Raises DoesNotFit.
    """
    from train.plan.choose import Choice, choose, on_ranks

    if processes is not None:
        cuda = cfg.hardware.device in ("auto", "cuda") and local.gpus() > 0
        cfg = on_ranks(cfg, world_size=processes, local_world_size=processes, device="cuda" if cuda else "cpu")
    elif cfg.hardware.gpu is None and cfg.hardware.device != "cpu":
        return Choice(cfg.strategy, None, note="not planned: hardware.gpu does not say which cards the nodes have")
    return choose(cfg, info, take=dry or cfg.hardware.device != "cpu")


def lighter(run: RunDir) -> list[str] | None:
    """Overrides of a layout that needs less memory than the one that the run was in; None if there is none."""
    layouts = json.loads(run.plan.read_text())["lighter"] if run.plan.is_file() else []
    return layouts[0] if layouts else None


def everything(cfg: Config, run: RunDir, arguments: Sequence[str], choice: Choice, processes: int | None) -> str:
    """All that decides what would run, the same each time: config, layout, engine settings, command and environment."""
    from train.plan.choose import engine_settings, settings

    p = choice.plan
    lines = [config.to_yaml(cfg), f"# exec_hash {config.exec_hash(cfg)}", f"# run       {run.path}"]
    lines.append(f"# layout    {' '.join(settings(p)) if p else choice.note}")
    if p is not None:
        lines.append(f"# predicted {p.peak_memory_gib:.2f} of {p.limit_gib:.1f} GiB a device, {p.step_s:.3g} s a step")
        lines += [f"# engine    {line}" for line in engine_settings(cfg, p).splitlines()]
    if processes is None:
        lines.append(slurm.render(cfg, run, ["--config", str(run.code / "config.yaml"), *arguments]))
    else:
        lines.append(str(local.launch(cfg, run, ["--config", str(run.config), *arguments], processes=processes)))
    return "\n".join(lines)


def difference(sides: tuple[str, str], shared: Sequence[str], **composing: str | None) -> str:
    """What would run otherwise. sides: each a run directory, or overrides as one word; shared: overrides of both."""
    from train.plan.choose import choose

    found = []
    for text in sides:
        asked = ask([*shlex.split(text), *shared], **composing)
        choice = choose(replace(asked.cfg, run=replace(asked.cfg.run, fit="warn")), asked.info)
        p = choice.plan
        ranks = p.ranks if p is not None and p.nodes == 1 and asked.cfg.slurm.name == "none" else None
        found.append((asked, everything(asked.cfg, asked.run, [], choice, ranks).splitlines()))
    lines = difflib.unified_diff(found[0][1], found[1][1], *sides, lineterm="", n=0)
    learned = [{group: config.to_dict(asked.cfg)[group] for group in config.WHAT} for asked, _ in found]
    differs = config.diff(*learned)
    last = ["What is learned differs: " + "; ".join(differs)] if differs else ["What is learned is the same."]
    return "\n".join([*lines, *last])
