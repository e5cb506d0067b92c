"""So that `accelerate launch -m train` and `python -m train` work.

Owns: the words of the command that are not overrides, and the way out: what an error means, its line for people, the
exit code. A config error is told before torch is imported.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config import Config

HELP = """\
usage: python -m train [overrides]                                        one process
       accelerate launch --multi_gpu --num_processes N -m train [overrides]   N processes

Overrides are Hydra's: experiment=NAME hardware=NAME strategy=NAME optim.lr=1e-3 train.max_steps=100 run.name=NAME ...
docs/config.md lists every setting; the groups and their options are the folders and files of conf/.

  --config FILE        run this frozen config (a run directory's config.yaml) instead of composing one
  --step best|last|N   the checkpoint to go on from
  --accept             go on although what is learned differs from the run's
  --config-dir DIR     more config groups
  --plugin MODULE      a package that adds models, sources or tasks
  --result             show the result if the run is finished, and do nothing else (exit code 1 if it is not)
  --cfg                print the composed config and exit
  -m, --multirun       a sweep: hands over to `gearshift run -m`
"""


def main(argv: list[str]) -> int:
    options: dict[str, str] = {}
    flags, overrides = set(), []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--config", "--step", "--config-dir", "--plugin"):
            options[name] = value or next(words, "")
        elif word in ("--accept", "--result", "--cfg", "--help", "-h", "-m", "--multirun"):
            flags.add(word)
        elif word.startswith(("--local-rank", "--local_rank")):
            continue  # some launchers add it; the environment says the same
        elif word.startswith("-"):
            return complain([f"{word} is not an option. See python -m train --help."])
        else:
            overrides.append(word)
    if flags & {"--help", "-h"}:
        print(HELP, end="")
        return 0
    if flags & {"-m", "--multirun"}:
        return multirun(argv)

    if empty := [name for name, value in options.items() if not value]:
        return complain([f"{empty[0]} needs a value. See python -m train --help."])

    from train import config, describe

    plugin, step = options.get("--plugin") or os.environ.get("GEARSHIFT_PLUGIN"), options.get("--step", "last")
    try:
        config.check_step(step)
        if "--config" in options:
            if plugin:
                config.import_plugin(plugin)
            cfg = config.load(options["--config"], overrides)
        else:
            cfg = config.compose(overrides, config_dir=options.get("--config-dir"), plugin=plugin)
        describe.refuse_secrets(cfg)
    except config.ConfigError as error:
        return complain([str(error)])
    if "--cfg" in flags:
        print(config.to_yaml(cfg), end="")
        return 0
    if "--result" in flags:
        return show_if_finished(cfg)

    from train import stop

    stop.catch_early()
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # after a death: on from where it was
    return run(cfg, "last" if again else step, accept="--accept" in flags)


def run(cfg: Config, step: str, *, accept: bool) -> int:
    """Train, and turn the errors that a run may end with into a line, a result and an exit code."""
    # Read by libgomp when torch loads it. Threads that spin while they wait make small models half as fast again on an idle
    # machine, and ten times slower where anything else runs; the command's own environment wins.
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1) or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.umask(os.umask(0o027) | 0o027)  # what libraries write into the run directory is nobody else's either

    from train import lifecycle
    from train.config import ConfigError

    code, reason = 1, "error"
    try:
        from train.main import train

        train(cfg, lifecycle.Request(int(step) if step.isdecimal() else step, accept))
        code = 0
    except ConfigError as error:
        code, reason = complain([str(error)]), "bad_config"
    except Exception as error:
        code, reason = lifecycle.explain(error)
    if code:
        lifecycle.fail(reason)
    # A group that is not destroyed, or a thread that still writes, must not turn a finished run into a failed one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def show_if_finished(cfg: Config) -> int:
    """The result of a finished run, without torch."""
    from train import config, data, describe, rundir

    try:
        prepared = data.prepare(cfg, lambda text: print(text, flush=True))
        found = rundir.resolve(cfg, config.math_hash(cfg, prepared.fingerprints))
        if (found.result() or {}).get("status") != "finished":
            return 1
        rundir.admit(cfg, found, prepared.fingerprints)
    except (data.DataError, rundir.RunError):
        return 1  # the run itself will say what is wrong
    print(describe.show_result(found))
    return 0


def multirun(argv: list[str]) -> int:
    """A sweep is started by the launcher, as a process: one process tree per job, never several runs in one process."""
    import subprocess

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return complain(
            [
                "-m starts a sweep, and a sweep is not started from inside a launch of several ranks: each rank would run all "
                "of it. Type instead: gearshift run " + " ".join(argv)
            ]
        )
    return subprocess.call([sys.executable, "-m", "launch", "run", *argv])


def complain(problems: list[str]) -> int:
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(problems), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
