"""The `gearshift` command: its verbs, their options, and their exit codes.

Owns: what a verb does in which order, what it prints, and how an error ends (a message on stderr, never a traceback,
and a code of the contract). A verb imports what it needs when it is called: `--help`, a config error and `status` never
import torch.

Does not own: processes (`local.py`), jobs (`slurm.py`), settings (`train/config.py`), files (`train/rundir.py`).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from train.config import Config
    from train.data import Prepared
    from train.rundir import RunDir

app = typer.Typer(
    name="gearshift",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train on one GPU or a cluster with one script. Settings are Hydra overrides, such as "
    "experiment=lm_stdlib hardware=cpu optim.lr=1e-3; docs/config.md lists them all.",
    epilog="Exit codes of run and resume: 0 finished, 2 bad config, 3 does not fit, 12 out of memory, "
    "75 stopped and saved, 1 anything else.",
)

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, e.g. optim.lr=1e-3", show_default=False)]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory")]
Plugin = Annotated[
    str | None, typer.Option(envvar="GEARSHIFT_PLUGIN", help="A package that adds models, sources or tasks")
]
ConfigDir = Annotated[str | None, typer.Option(help="A directory of more config groups")]
To = Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the files go", show_default=False)]
Which = Annotated[str, typer.Option("--step", help="best, last, or a number: the checkpoint to take")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show config, hashes, command and environment; start nothing")]
Wait = Annotated[bool, typer.Option("--wait", help="On Slurm: wait for the end of the run, return its exit code")]
Json = Annotated[bool, typer.Option("--json", help="For programs")]


def main() -> None:
    """Entry point of the `gearshift` script."""
    app()


def verb(function: Callable[..., int]) -> Callable[..., None]:
    """Register a verb: its return value is the exit code; an error that a user can mend is told in its own words."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        from launch.slurm import SlurmError
        from train.compose import ConfigError
        from train.data import DataError
        from train.rundir import EXIT_CONFIG, EXIT_FAILED, RunError

        try:
            code = function(*args, **kwargs)
        except (ConfigError, DataError) as error:
            code = complain(error, EXIT_CONFIG)
        except RunError as error:
            code = complain(error, error.code)
        except SlurmError as error:
            code = complain(error, EXIT_FAILED)
        except KeyboardInterrupt:
            code = complain("interrupted", EXIT_FAILED)
        raise typer.Exit(code)

    app.command()(guarded)
    return guarded


def say(text: object) -> None:
    """A line about what is happening; stdout is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def complain(error: object, code: int) -> int:
    say(error)
    return code


# ------------------------------------------------------------------------------------------------------------- verbs


@verb
def run(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", help="A sweep over comma-separated values")] = False,
    dry_run: DryRun = False,
    wait: Wait = False,
    on_oom: Annotated[str, typer.Option("--on-oom", help="Out of memory: stop, or replan and go on, here")] = "stop",
    plugin: Plugin = None,
    config_dir: ConfigDir = None,
) -> int:
    """Prepare, plan, freeze and start a run, or go on with it; a finished run shows its result."""
    from train import config

    if on_oom not in ("stop", "replan"):
        raise config.ConfigError([f"--on-oom {on_oom}: must be stop or replan."])
    if multirun and on_oom != "stop":
        raise config.ConfigError(
            [f"--on-oom {on_oom}: is for a single run; in a sweep set a layout that fits (strategy=...)."]
        )
    _importable_from_here(plugin)
    if multirun:
        from launch import sweep

        return sweep.run(overrides or [], plugin=plugin, config_dir=config_dir, dry_run=dry_run, wait=wait, say=say)
    cfg = config.compose(overrides or [], config_dir=config_dir, plugin=plugin)
    replan = on_oom == "replan"
    return _start(cfg, ["--plugin", plugin] if plugin else [], dry_run=dry_run, wait=wait, replan=replan)


@verb
def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN] [OVERRIDES]", help="An experiment, or what remains of RUN", show_default=False),
    ] = None,
    all_hardware: Annotated[bool, typer.Option("--all-hardware", help="A row per tier of conf/hardware")] = False,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="What would run otherwise: two runs, or two lists of overrides in quotes"),
    ] = None,
    as_json: Json = False,
    plugin: Plugin = None,
    config_dir: ConfigDir = None,
) -> int:
    """Whether it fits, how it would run, how long and for how much. Starts nothing; exit code 3 if nothing fits."""
    from launch import planning

    _importable_from_here(plugin)
    composing = {"plugin": plugin, "config_dir": config_dir}
    if diff is not None:
        print(planning.difference(diff, words or [], **composing))
        return 0
    return planning.plan(planning.ask(words or [], **composing), all_hardware=all_hardware, as_json=as_json)


@verb
def resume(
    run: RunPath,
    overrides: Overrides = None,
    step: Annotated[str, typer.Option(help="best, last, or a number: the checkpoint to go on from")] = "last",
    accept: Annotated[bool, typer.Option("--accept", help="Go on although what is learned changes")] = False,
    dry_run: DryRun = False,
    wait: Wait = False,
    plugin: Plugin = None,
) -> int:
    """Go on from a run's frozen config; where, how, paths and what is watched may change."""
    from dataclasses import replace

    from train import config

    config.check_step(step)
    overrides = overrides or []
    directory = _existing(run)
    _import(plugin)
    cfg = config.load(directory.path, overrides)
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    limits: dict[str, Any] = {key: None for key in ("stop_at", "max_time") if f"run.{key}" not in given}
    limits |= {"name": directory.path.name, "root": str(directory.path.parent)}  # wherever it was copied to
    cfg = replace(cfg, run=replace(cfg.run, **limits))
    if cfg.slurm.name != "none" and (directory.code / "config.yaml").exists():
        # `config.yaml` has the nodes that were granted last; asked for were those of the submission.
        cfg = replace(cfg, hardware=config.load(directory.code, overrides).hardware)
    arguments = ["--step", step] + (["--accept"] if accept else []) + (["--plugin", plugin] if plugin else [])
    return _start(cfg, arguments, accept=accept, again=step != "last", dry_run=dry_run, wait=wait)


@verb
def prepare(overrides: Overrides = None, plugin: Plugin = None, config_dir: ConfigDir = None) -> int:
    """Fetch, tokenise, pack and fingerprint the data, and show three samples as the model will see them. No GPU."""
    from train import config, data

    _importable_from_here(plugin)
    cfg = config.compose(overrides or [], config_dir=config_dir, plugin=plugin)
    prepared = _prepared(cfg)
    for sample in data.show(prepared, cfg):
        print(sample, end="\n\n")
    for name, value in {**prepared.info, **prepared.fingerprints}.items():
        print(f"{name:<20} {value}")
    print(f"{'in':<20} {prepared.directory}")
    return 0


@verb
def predict(
    run: RunPath,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT] [OVERRIDES]",
            help="A file or a folder; without one, what the run held out. Overrides: where, how and paths",
            show_default=False,
        ),
    ] = None,
    *,
    to: To,
    step: Which = "best",
    plugin: Plugin = None,
) -> int:
    """PNG masks and overlays, CSV classes, continued text; metrics where the true answers are there."""
    from train import config

    given = words or []
    overrides = [word for word in given if "=" in word and not Path(word).exists()]
    inputs = [word for word in given if word not in overrides]
    if len(inputs) > 1:
        raise config.ConfigError([f"INPUT is one file or folder, and {len(inputs)} are given: {' '.join(inputs[:5])}"])
    config.check_step(step)
    directory = _existing(run)
    _import(plugin)
    with _told():
        from train.predict import predict

        source = inputs[0] if inputs else None
        metrics = predict(directory.path, source, to, step=step, overrides=overrides, say=say)
    for name, value in metrics.items():
        print(f"{name:<20} {value:.6g}")
    return 0


@verb
def export(
    run: RunPath,
    overrides: Overrides = None,
    *,
    to: To,
    step: Which = "best",
    merge: Annotated[
        bool, typer.Option("--merge", help="Add adapters to their base; QLoRA's to the base as it was")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the stored weights: fp32, bf16 or fp16")] = "fp32",
    shard_size: Annotated[str, typer.Option(help="Of the largest file")] = "5GB",
    plugin: Plugin = None,
) -> int:
    """Weights for others, in the layout that their libraries load; loaded back and compared with the run."""
    from train import config

    config.check_step(step)
    directory = _existing(run)
    _import(plugin)
    with _told():
        from train.export import export

        export(
            directory.path, to, step=step, merge=merge, dtype=dtype, shard_size=shard_size, overrides=overrides or (),
            say=print,
        )  # fmt: skip
    return 0


@verb
def status(
    path: Annotated[Path, typer.Argument(metavar="[RUN|ROOT]", help="A run directory, or a directory of them")] = Path(
        "runs"
    ),
    as_json: Json = False,
) -> int:
    """How a run stands, or every run and sweep below a directory: queued, running, stopped, finished, failed, and why."""
    from launch import slurm, sweep
    from train import describe, rundir

    one = rundir.RunDir(path)
    if (jobs := sweep.read(one.path)) is not None and not as_json:
        print(sweep.table(jobs))
        return 0
    found = [one] if _is_run(one.path) else sorted(_runs(one.path), key=lambda run: run.path)
    if not found:
        return complain(f"{path}: no run directory, and none below it. `gearshift run` starts one.", 1)
    rows = [slurm.standing(run, describe.standing(run)) for run in found]
    if as_json:
        print(rundir.to_json(rows[0] if found == [one] else rows, indent=2))
    elif found == [one] and rows[0]["state"] not in ("running", "queued"):
        print(describe.show_result(one))
    else:
        for row in rows:
            print("  ".join(text for text in describe.standing_text(row) if text))
    return 0


@verb
def verify(run: RunPath, as_json: Json = False) -> int:
    """Prove that every sample was used exactly once and every checkpoint is whole, or name the gap (exit code 1)."""
    from train import ledger, rundir

    found = ledger.verify(_existing(run))
    if as_json:
        print(rundir.to_json(found, indent=2))
    elif found["clean"]:
        print(
            f"{found['run']}: clean. {found['positions']:,} positions of {found['steps']:,} steps, each used exactly once, "
            f"in attempts {found['attempts']} on {found['ranks']} ranks ({found['redone']:,} steps beyond a kept "
            f"checkpoint); whole checkpoints of steps {found['checkpoints']}."
        )
    else:
        print("\n".join([f"{found['run']}: {len(found['problems'])} problems", *found["problems"]]))
    return 0 if found["clean"] else rundir.EXIT_FAILED


@verb
def doctor(
    directory: Annotated[Path, typer.Argument(metavar="[DIRECTORY]", help="Where runs will lie")] = Path("runs"),
    build: Annotated[
        bool, typer.Option("--build", help="Compile what DeepSpeed would compile at its first use")
    ] = False,
    as_json: Json = False,
) -> int:
    """Whether this machine is fit for a run, with a remedy for everything that is not. On a cluster: slurm/preflight."""
    from launch import doctor

    return doctor.run(directory, as_json=as_json, build=build)


# ------------------------------------------------------------------------------------------------- what verbs share


def _start(
    cfg: Config,
    arguments: list[str],
    *,
    accept: bool = False,
    again: bool = False,
    dry_run: bool = False,
    wait: bool = False,
    replan: bool = False,
) -> int:
    """From a config to the end of its run, or to its submission.

    arguments: what the training script gets beside the config. again: go on from an earlier step, though the run may be
    finished. wait: for the end of a submitted run. replan: go on with a lighter layout where memory runs out.
    """
    from launch import local, planning, slurm
    from train import config, describe, rundir

    describe.refuse_secrets(cfg)
    if problems := config.missing_inputs(cfg):
        raise config.ConfigError(problems)
    prepared = _prepared(cfg)
    run = rundir.resolve(cfg, config.math_hash(cfg, prepared.fingerprints))
    identity = rundir.admit(cfg, run, prepared.fingerprints, accept=accept)
    if (run.result() or {}).get("status") == "finished" and not identity.changes and not again:
        print(describe.show_result(run))
        return rundir.EXIT_FINISHED
    processes = local.world_size(cfg) if cfg.slurm.name == "none" else None
    if replan and processes is None:
        raise config.ConfigError([f"--on-oom replan: goes on here, not under slurm={cfg.slurm.name}; leave it out."])
    choice = planning.layout(cfg, prepared.info, processes=processes, dry=dry_run)
    if dry_run:
        print(planning.everything(cfg, run, arguments, choice, processes))
        print(
            "\n".join([f"# math_hash {identity.math_hash}", *(f"# change    {change}" for change in identity.changes)])
        )
        return 0
    if processes is None:
        slurm.refuse_twice(run)  # before anything that waits for, or gives up on, the run's owner
    rundir.wait_until_free(run, say=say)
    run.create()
    rundir.write_config(cfg, run, identity)
    if processes is None:
        return slurm.submit(cfg, run, options=arguments, wait=wait, say=say)
    words: list[str] | None = arguments
    while words is not None:
        started = local.launch(cfg, run, ["--config", str(run.config), *words], processes=processes)
        code = local.supervise(started, run, say)
        words = planning.lighter(run) if replan and code == rundir.EXIT_MEMORY else None
        if words is not None:
            say(f"Out of memory: going on from the last checkpoint with {' '.join(words)}")
            words = [*arguments, *words]
    if code not in (rundir.EXIT_FINISHED, rundir.EXIT_STOPPED):  # of these two the run itself has told
        say(f"\n{describe.show_result(run)}")
    return code


def _prepared(cfg: Config) -> Prepared:
    from train import data
    from train.plan.choose import remember

    prepared = data.prepare(cfg, say)
    remember(cfg, prepared.info)
    return prepared


@contextmanager
def _told() -> Iterator[None]:
    """What the parts of a trained model complain of, as an error that `verb` tells. Loads torch."""
    from train.checkpoint import CheckpointError
    from train.models import ModelError
    from train.rundir import RunError

    try:
        yield
    except (CheckpointError, ModelError) as error:
        raise RunError(str(error)) from error


def _import(plugin: str | None) -> None:
    """For the verbs that compose nothing: a run directory never names a plug-in."""
    from train import config

    _importable_from_here(plugin)
    if plugin is not None:
        config.import_plugin(plugin)


def _importable_from_here(plugin: str | None) -> None:
    """A plug-in may lie in the current directory, which the `gearshift` script does not search by itself."""
    if plugin is not None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _existing(path: Path) -> RunDir:
    from train.rundir import EXIT_CONFIG, RunDir, RunError

    if not _is_run(path):
        raise RunError(
            f"{path} is not a run directory: it has no config.yaml. `gearshift status` lists runs.", EXIT_CONFIG
        )
    return RunDir(path)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _runs(root: Path) -> list[RunDir]:
    """Run directories in `root` and in its sweeps."""
    from train.rundir import RunDir

    return [RunDir(file.parent) for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/config.yaml")]
