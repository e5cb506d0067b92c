"""A run as one Slurm job: the script that is submitted, a job's beginning and end, and what Slurm says of it.

Owns: the text of the batch script, the freezing of config and code at submission, the decision after every launch of
the ranks (again, requeue, or end), every call of a Slurm program outside of the script itself (`slurm/train.sbatch`).

Does not own: how ranks train and save (`train`), the lock (`train/rundir.py`), sweeps (`launch/sweep.py`).

A person's values reach the script as words quoted by `shlex`, and Slurm as quoted directives; only `slurm.setup`, which
is shell by its nature, is pasted. Inside a job the script calls `begin`, `stop` and `settle` below, which need no torch
and do without Slurm's programs, which a container may not have.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch import local
from train import config, rundir
from train.config import Config
from train.rundir import FINAL, FRUITLESS, RunDir, newest

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "slurm" / "train.sbatch"
BODY = "# ----"
"""The first line of the script that begins so is where what is the same for every run starts."""
FROZEN = ("train", "launch", "conf", "slurm")
ALIVE = ["PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "RESIZING", "STAGE_OUT", "STOPPED"]
"""States of a job that is not over."""
NOTICE = "notice from Slurm"
"""How the text of a STOP begins that the batch script wrote; any other is a person's."""


class SlurmError(rundir.RunError):
    """Slurm cannot be used as asked; the message says what it answered and what to type."""


# ----------------------------------------------------------------------------------------------------------- the script


def render(cfg: Config, run: RunDir, arguments: Sequence[str], *, python: str = sys.executable) -> str:
    """The batch script of a run: `slurm/train.sbatch` with this config's directives, setup and arguments.

    arguments: what `python -m train` gets. Raises SlurmError for a path that Slurm's directives cannot hold.
    """
    log = f"{str(run.logs).replace('%', '%%')}/slurm-%j.log"
    return _text(cfg, run.path.name, log, shlex.quote(str(run.code)), shlex.join(arguments), python)


def render_array(
    cfg: Config, sweep: Path, array: str, options: Sequence[str] = (), *, python: str = sys.executable
) -> str:
    """The script of a sweep's array: task n is the run `sweep/00n` as it was frozen there. array: sbatch --array.
    options: of the command, for every task."""
    log = f"{str(sweep).replace('%', '%%')}/%3a/logs/slurm-%A_%a.log"
    here = f'"$(printf %s/%03d/code {shlex.quote(str(sweep))} "$SLURM_ARRAY_TASK_ID")"'
    arguments = shlex.join(options)
    return _text(cfg, sweep.name, log, here, f'--config "$code/config.yaml" {arguments}'.rstrip(), python, array)


def _text(cfg: Config, name: str, log: str, code: str, arguments: str, python: str, array: str | None = None) -> str:
    """code, arguments: words that a shell may read."""
    slurm, hardware = cfg.slurm, cfg.hardware
    gpus = slurm.gpus_per_node
    if gpus is None and hardware.device != "cpu" and (hardware.device == "cuda" or hardware.gpu):
        gpus = str(hardware.devices_per_node or 1)
    options = {
        "job-name": re.sub(r"[^A-Za-z0-9._-]+", "-", name),
        "array": array,
        "nodes": hardware.nodes,
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.signal_s}",
        "open-mode": "append",
        "output": log,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "gpus-per-node": gpus,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
    }
    lines = ["#!/bin/bash", "#SBATCH --requeue"]
    lines += [_directive(option, value) for option, value in options.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in slurm.extra]
    lines += ["", *slurm.setup]
    if not slurm.setup:  # a setup brings its own Python
        lines.append(f"python={shlex.quote(python)}")
    lines += [
        "# config and code as they were at submission; what a job needs was prepared then",
        f"code={code}",
        'export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1',  # modules may have set it, too
        "export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1",
        f'set -- {arguments} "$@"',
        "",
    ]
    text = SCRIPT.read_text()
    return "\n".join(lines) + "\n" + text[text.index(BODY) :]


def _directive(name: str, value: object) -> str:
    """`#SBATCH --name=value`, quoted as sbatch reads it, which is not quite as a shell does."""
    text = str(value)
    if not text.isprintable() or "\\" in text:
        raise SlurmError(f"--{name}={text!r}: Slurm's directives hold neither line breaks nor backslashes.")
    if not re.fullmatch(r"[A-Za-z0-9._/:=,@%+-]+", text):
        text = '"' + text.replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={text}"


def freeze(cfg: Config, run: RunDir) -> list[str]:
    """Copy the code and `cfg` into the run directory; the arguments with which `python -m train` runs just that.

    Plug-ins that are imported now are copied too. A later edit of the checkout does not change what is queued.
    """
    run.create()
    fresh = run.code.with_name(f".code.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "local", "*.pyc")
    for name in FROZEN:
        shutil.copytree(CHECKOUT / name, fresh / name, ignore=skip)
    from train.compose import PLUGINS

    for plugin in PLUGINS:
        module = sys.modules[plugin.partition(".")[0]]
        source = Path(str(module.__file__))
        if source.name == "__init__.py":
            shutil.copytree(source.parent, fresh / source.parent.name, ignore=skip)
        else:
            shutil.copy2(source, fresh / source.name)
    settled = replace(cfg, run=replace(cfg.run, root=str(run.path.parent), name=run.path.name))
    (fresh / "config.yaml").write_text(config.to_yaml(settled))
    shutil.rmtree(run.code, ignore_errors=True)
    fresh.rename(run.code)
    once = [f"run.{key}={value}" for key in ("stop_at", "max_time") if (value := getattr(cfg.run, key)) is not None]
    return ["--config", str(run.code / "config.yaml"), *once]


# ----------------------------------------------------------------------------------------------------------- submission


def submit(
    cfg: Config, run: RunDir, *, options: Sequence[str] = (), wait: bool = False, say: Callable[[str], None] = print
) -> int:
    """Freeze a prepared and planned run, submit it, and return 0; with `wait` the exit code of the run.

    options: `--step`, `--accept` for the first attempt. Raises SlurmError.
    """
    refuse_twice(run)
    script = run.code / "train.sbatch"
    arguments = [*freeze(cfg, run), *options]
    script.write_text(render(cfg, run, arguments))
    run.clear_requests()
    job = sbatch(cfg.slurm.name, script)
    run.event("submit", job=job, slurm=cfg.slurm.name)
    say(f"submitted {run.path} as Slurm job {job}\n  tail -F {run.logs}/slurm-{job}.log\n  scancel {job}")
    return wait_for(run, say) if wait else 0


def refuse_twice(run: RunDir) -> None:
    """Raise SlurmError if a job of this run waits or runs."""
    waiting = state(run)
    if waiting and not waiting["over"]:
        raise SlurmError(
            f"{run.path} is already {waiting['state']} as Slurm job {waiting['job']}.\n"
            f"Cancel that first (scancel {waiting['job']}), or give this run another name: run.name=..."
        )


def sbatch(name: str, *words: object) -> str:
    """Submit; the job's id."""
    return call(name, "sbatch", "--parsable", *map(str, words)).strip().partition(";")[0]


def wait_for(run: RunDir, say: Callable[[str], None] = print) -> int:
    """Wait until the run's newest job is over; the exit code of the contract. (`sbatch --wait` looks every 32 s.)"""
    while (now := state(run)) and not now["over"]:
        time.sleep(1.0)
    result = run.result()
    if result is None or result["status"] == "running":
        say(f"Slurm ended the job ({now and now['state']}) before the run wrote a result: see {run.logs}")
    return rundir.exit_code(result)


def state(run: RunDir) -> dict[str, Any] | None:
    """What Slurm says of the newest job of a run: `job`, `state`, `over`, `reason`, `nodes`; None if there was none.

    A job that Slurm has forgotten, or whose cluster is gone, is over. Of one that cannot be asked about now (a controller that
    restarts) nobody knows: it is `unknown`, and not over.
    """
    jobs = [event for event in rundir.read_jsonl(run.events) if event["kind"] in ("submit", "launch")]
    if not jobs:
        return None
    job = str(jobs[-1]["job"])
    try:
        facts = _facts(jobs[-1]["slurm"], job)
    except SlurmError as error:
        if not any(words in str(error) for words in ("no cluster runs", "no Slurm here")):
            return {"job": job, "state": "unknown", "over": False, "reason": str(error), "nodes": None}
        facts = {}
    word = facts.get("JobState", "forgotten")
    over = word not in ALIVE
    return {"job": job, "state": word, "over": over, "reason": facts.get("Reason"), "nodes": facts.get("NumNodes")}


def standing(run: RunDir, row: dict[str, Any]) -> dict[str, Any]:
    """`describe.standing` with what Slurm adds: `queued` for a job that waits, in the queue or to be started again."""
    if row["state"] in ("finished", "failed") or (now := state(run)) is None or now["state"] == "unknown":
        return row
    if now["over"]:  # a login node cannot see whether the ranks live; Slurm can
        return {**row, "state": "died", "slurm": now} if row["state"] == "running" else row
    owner = f"Slurm job {now['job']}" + (f", {now['reason']}" if now["state"] == "PENDING" else "")
    return {**row, "state": "running" if now["state"] == "RUNNING" else "queued", "owner": owner, "slurm": now}


def _facts(name: str, job: str) -> dict[str, str]:
    """What Slurm says of a job; empty if it has forgotten it. Raises SlurmError where it cannot be asked."""
    try:
        return parse(call(name, "scontrol", "show", "job", "-o", job))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise


def parse(record: str) -> dict[str, str]:
    """`scontrol show job -o` as a dict. Of an array, the last record."""
    lines = [line for line in record.splitlines() if line.startswith("JobId=")]
    return dict(re.findall(r"(\S+?)=(\S*)", lines[-1])) if lines else {}


def call(name: str, *command: str) -> str:
    """Output of a Slurm program of `slurm=name`. Raises SlurmError with what it said."""
    environment = dict(os.environ)
    if name == "devcluster" and "SLURM_CONF" not in environment:
        tool = CHECKOUT / "slurm" / "devcluster"
        base = environment.get("GEARSHIFT_DEVCLUSTER") or f"/tmp/gearshift-devcluster-{os.getuid()}"
        if not Path(base, "etc", "slurm.conf").exists():
            raise SlurmError(f"slurm=devcluster: no cluster runs in {base}. Start one with: {tool} start")
        environment |= {"PATH": f"{base}/bin:{environment['PATH']}", "SLURM_CONF": f"{base}/etc/slurm.conf"}
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise SlurmError(
            f"{command[0]} is not on the PATH, so there is no Slurm here. Without one, slurm=none runs on this "
            "machine, and slurm=devcluster on a throwaway cluster (slurm/devcluster start)."
        )
    try:
        done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within 60 s; is the controller up? Try: scontrol ping") from None
    if done.returncode:
        raise SlurmError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# -------------------------------------------------------------------------------- inside a job: begin, stop, settle


@dataclass
class Launch:
    """One launch of the ranks in a job, as its events tell it."""

    step: int
    """Newest checkpoint when it began."""
    after: int
    """The last attempt before it."""
    cause: str = "unknown"
    """Why it ended: a key of `judge`, `ended by Slurm` where only a signal was heard, `unknown` where nothing was."""
    end_step: int = 0
    """Newest checkpoint when the next one began."""

    @property
    def fruitless(self) -> bool:
        return self.end_step <= self.step and self.cause not in ("preempted", "ended by Slurm")


@dataclass(frozen=True)
class Verdict:
    """What the batch script does next, and why."""

    action: str
    """`again` in this allocation, `requeue`, or `end`."""
    cause: str
    reason: str
    code: int


def begin(arguments: Sequence[str]) -> list[str]:
    """Before the ranks start: run directory, processes per node, port, a config for `accelerate launch` that sets
    nothing, and the ranks' arguments. Empty: nothing to do.

    arguments: what the batch script got. Raises ConfigError, RunError, DataError.
    """
    cfg, run, words, first = _open(arguments)
    job, restart = _job()
    launches, now = _history(run, job), newest(run)
    if (run.result() or {}).get("status") == "finished" and (launches or not first):
        from train.describe import show_result

        _say(show_result(run))
        return []
    owner = rundir.holder(run)
    if owner and owner.get("job") and owner["job"] != job and not owner.get("released") and _is_over(owner["job"]):
        rundir.bury(run, owner)
    rundir.wait_until_free(run, say=_say)

    stuck = _no_progress(launches, now) if launches else None
    # Counted here too: a save that outlasts the notice is requeued by the script's alarm, past `settle`.
    if stuck is None and (enough := _used_up(launches, cfg.slurm.max_requeues)):
        stuck = f"{enough}."
    if stuck:
        _give_up(run, stuck)
        raise rundir.RunError(stuck)
    if (launches or _stopped_in_queue(run, job)) and (asked := run.stop_reason()) and not asked.startswith(NOTICE):
        raise rundir.RunError(f"not started again: {asked}", rundir.EXIT_STOPPED)
    run.create().clear_requests()

    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    processes = cfg.hardware.devices_per_node
    if processes is None:
        processes = int(os.environ.get("SLURM_GPUS_ON_NODE", "1")) if cfg.hardware.device != "cpu" else 1
    if nodes * processes > cfg.train.global_batch_size:
        raise config.ConfigError(
            [
                f"{nodes} nodes x {processes} processes for train.global_batch_size={cfg.train.global_batch_size}: a rank needs "
                "at least one sample. Ask for fewer nodes (hardware.nodes), or raise train.global_batch_size."
            ]
        )
    attempt = run.last_attempt()
    begun = bool(launches) and attempt > launches[0].after  # until then, what was asked of the first attempt holds
    run.event("launch", job=job, restart=restart, nodes=nodes, processes=processes, step=now, after=attempt,
              slurm=cfg.slurm.name, max_requeues=cfg.slurm.max_requeues)  # fmt: skip
    port = _free_port(int(re.sub(r"\D", "", job)) * 131 + restart * 17 + len(launches))
    words += [
        *([] if begun else first),
        f"run.name={run.path.name}",
        f"hardware.nodes={nodes}",
        f"hardware.devices_per_node={processes}",
    ]
    return [str(run.path), str(processes), str(port), str(local.ACCELERATE_CONFIG), *words]


def _stopped_in_queue(run: RunDir, job: str) -> bool:
    """Whether STOP was written after this job was submitted: not a left-over, but a wish."""
    submitted = [e["time"] for e in rundir.read_jsonl(run.events) if e["kind"] == "submit" and e["job"] == job]
    return bool(submitted) and run.stop.exists() and run.stop.stat().st_mtime > submitted[-1]


def _open(words: Sequence[str]) -> tuple[Config, RunDir, list[str], list[str]]:
    """Config and directory of the run, frozen ones from a submission or composed and prepared here; the arguments of
    the ranks, and those which hold for the first launch only: from then on a run goes on from its newest checkpoint.
    """
    options = argparse.ArgumentParser(prog="train.sbatch", allow_abbrev=False)
    for name in ("--config", "--config-dir", "--plugin", "--step"):
        options.add_argument(name)
    options.add_argument("--accept", action="store_true")
    options.add_argument("--multirun", action="store_true")
    given, overrides = options.parse_known_args(words)
    first = (["--step", given.step] if given.step else []) + (["--accept"] if given.accept else [])
    kept = [word for name in ("config", "config_dir", "plugin") if (value := getattr(given, name))
            for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    plugin = given.plugin or os.environ.get("GEARSHIFT_PLUGIN")
    if given.config:  # complete and checked at submission
        if plugin:
            config.import_plugin(plugin)
        cfg = config.load(given.config, overrides)
        return cfg, RunDir(Path(cfg.run.root) / str(cfg.run.name)), [*kept, *overrides], first
    if given.multirun:
        from launch.sweep import array_task

        overrides = array_task(overrides, kept, int(os.environ["SLURM_ARRAY_TASK_ID"]))
    cfg = config.compose(overrides, config_dir=given.config_dir, plugin=plugin)
    from train import data

    prepared = data.prepare(cfg, _say)
    run = rundir.resolve(cfg, config.math_hash(cfg, prepared.fingerprints))
    rundir.admit(cfg, run, prepared.fingerprints, accept=given.accept)
    return cfg, run, [*kept, *overrides], first


def stop(run: RunDir, signal_name: str) -> None:
    """A signal reached the batch script or a node's launcher: ask the ranks to save and leave.

    Not if the run has gone on elsewhere meanwhile: on a node that was cut off and comes back, Slurm ends the old job's
    processes, and their last word must not stop the new ones.
    """
    job, restart = _job()
    owner = rundir.holder(run) or {}
    if owner.get("job") == job and (owner.get("job_start") or 0) > restart:
        return
    if owner.get("job") not in (job, None) and not owner.get("released"):
        return
    run.event("signal", signal=signal_name, job=job, restart=restart)
    run.ask_to_stop(f"{NOTICE} ({signal_name})")


def settle(run: RunDir, *, code: int, heard: set[str], facts: dict[str, str], lost: bool = False) -> Verdict:
    """After the ranks have left: write down why, and decide. See `judge`."""
    job, restart = _job()
    events = [e for e in rundir.read_jsonl(run.events) if e["kind"] == "launch"]
    ours = events[-1]
    if (ours["job"], ours["restart"]) != (job, restart):
        return Verdict("end", "superseded", "the run goes on in another job", 1)
    result = run.result() or {}
    if (result.get("attempt") or 0) <= ours["after"]:
        result = {}  # an earlier attempt's
    elif result["status"] in ("running", "failed") and (
        why := run.failure(result["attempt"], result.get("reason") or "")
    ):
        result |= {"status": "failed", "reason": why}  # any rank's, where the main process could not write it down
    verdict = judge(result, run.stop_reason(), code, heard, facts, restart, lost)
    launches, now = _history(run, job), newest(run)
    launches[-1].cause = verdict.cause
    if verdict.action != "end":
        stuck = _no_progress(launches, now)
        if stuck:
            verdict = replace(verdict, action="end", reason=f"{stuck} The last one: {verdict.reason}.", code=1)
        elif verdict.cause == "time limit" and (enough := _used_up(launches, ours["max_requeues"])):
            verdict = replace(verdict, action="end", reason=f"{enough}; {verdict.reason}")
    run.event(
        "settle", job=job, restart=restart, cause=verdict.cause, action=verdict.action, reason=verdict.reason, step=now
    )
    if verdict.action == "end" and verdict.cause in ("died", "time limit", "failed"):
        _give_up(run, verdict.reason)
    return verdict


def judge(
    result: dict[str, Any],
    asked: str | None,
    code: int,
    heard: set[str],
    facts: dict[str, str],
    restart: int = 0,
    lost: bool = False,
) -> Verdict:
    """What to do after a launch, from what is known when its ranks have left.

    result: `result.json` if this launch wrote it, else empty. asked: the text of STOP. code: srun's exit code. heard:
    signals that the batch script got. facts: `scontrol show job`, empty if it did not answer. restart: how often Slurm
    had started this job again when the launch began. lost: a node of the allocation does not answer.
    """
    status, why = result.get("status"), result.get("reason") or ""
    left = rundir.exit_code(result) if result else code
    at = f" at step {result['steps']}" if "steps" in result else ""
    told = why if status == "stopped" else asked or ""

    if status == "finished":
        return Verdict("end", "finished", "finished", 0)
    if status == "failed" and why.startswith(FINAL):
        return Verdict("end", "failed", why, left)
    if not result and code in rundir.CLASSIFIED.values():
        return Verdict("end", "failed", f"the ranks left with code {code} before the run began", code)
    if not facts:
        return Verdict("end", "unreachable", f"Slurm does not answer on {socket.gethostname()}", 1)
    if told and not told.startswith((NOTICE, "signal ")):
        return Verdict("end", "asked", f"stopped by {told}{at}", left)
    if int(facts.get("Restarts", "0")) > restart:
        return Verdict("end", "ended by Slurm", f"ended by Slurm{at}, which starts it again by itself", left)
    if facts["JobState"] != "RUNNING":  # COMPLETING for a cancelled job and for one at its limit alike
        if not _limit_reached(facts):
            return Verdict("end", "cancelled", f"cancelled{at}", left)
        return Verdict("requeue", "time limit", f"the time limit was reached{at}", left)
    if facts.get("PreemptTime", "None") not in ("None", "Unknown"):
        return Verdict("requeue", "preempted", f"preempted{at}", left)
    if heard & {"USR1", "ALRM"}:
        return Verdict("requeue", "time limit", f"the time limit was near{at}", left)
    if lost:
        return Verdict("requeue", "lost node", f"a node does not answer{at}", left)
    if status == "stopped" and restart and not heard:
        # An srun that was cut off with its node and is back ends the step of its number, which now is this one.
        return Verdict("again", "died", f"the step, but not the job, was told to end{at}", left)
    if status == "stopped" or heard:
        return Verdict("end", "asked", f"stopped by {told or 'a signal'}{at}", left)
    return Verdict("again", "died", why or f"the ranks died without a word (srun's exit code is {code})", 1)


def _limit_reached(facts: dict[str, str]) -> bool:
    try:
        return config.seconds(facts["RunTime"]) >= config.seconds(facts["TimeLimit"])
    except (KeyError, ValueError):  # such as UNLIMITED
        return False


def _history(run: RunDir, job: str) -> list[Launch]:
    """The launches of this job, oldest first; the last one's `end_step` is its caller's to know."""
    launches: list[Launch] = []
    for event in rundir.read_jsonl(run.events):
        if event.get("job") != job:
            continue
        if event["kind"] == "launch":
            if launches:
                launches[-1].end_step = event["step"]
            launches.append(Launch(event["step"], event["after"]))
        elif launches and event["kind"] == "settle" and launches[-1].cause != "time limit":
            launches[-1].cause = event["cause"]
        elif launches and event["kind"] == "signal" and launches[-1].cause == "unknown" and event["signal"] != "USR1":
            # ALRM: it did not leave within the notice, so the script requeued it; Slurm's TERM follows
            launches[-1].cause = "time limit" if event["signal"] == "ALRM" else "ended by Slurm"
    return launches


def _no_progress(launches: list[Launch], now: int) -> str | None:
    """What to tell a person if the last attempts brought nothing; None while there is hope."""
    launches[-1].end_step = now
    if len(launches) < FRUITLESS or not all(launch.fruitless for launch in launches[-FRUITLESS:]):
        return None
    have = f"the newest is step {now}" if now else "there is none yet"
    return f"no-progress: {FRUITLESS} attempts in a row ended without a new checkpoint ({have})."


def _used_up(launches: list[Launch], allowed: int) -> str | None:
    """What to tell a person if the planned number of time-outs is exceeded."""
    timeouts = sum(launch.cause == "time limit" for launch in launches)
    return f"slurm.max_requeues={allowed} time-outs are used up" if timeouts > allowed else None


def _give_up(run: RunDir, reason: str) -> None:
    """Write down the end of a run whose ranks could not do so themselves."""
    result = run.result() or {}
    if result.get("status") in ("finished", "stopped") or result.get("reason") == reason:
        return
    kept = {key: value for key, value in result.items() if key not in ("status", "attempt", "reason", "name")}
    if result.get("status") == "failed" and result.get("reason"):
        kept["error"] = result["reason"]
    run.write_result("failed", result.get("attempt") or run.last_attempt(), reason=reason, **kept)
    run.event("end", status="failed", reason=reason)


def _job() -> tuple[str, int]:
    """This job, and how often it was started again."""
    return os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _is_over(job: str) -> bool:
    """Whether Slurm knows that a job has ended. False where it cannot be asked."""
    try:
        return _facts("cluster", job).get("JobState") not in ALIVE
    except SlurmError:
        return False


def _free_port(seed: int) -> int:
    """A port that is free here now, another one for every launch of every job."""
    for n in range(1000):
        port = 10000 + (seed + n) % 20000
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise SlurmError("none of 1000 ports is free on this node")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """`python -m launch.slurm begin|stop|settle ...`, as `slurm/train.sbatch` calls it."""
    verb, words = argv[0], list(argv[1:])
    if verb == "begin":
        from train.data import DataError

        try:
            print(*begin(words), sep="\0", end="\0")  # a lone end: nothing to do
        except (config.ConfigError, DataError, rundir.RunError) as error:
            _say(str(error))
            return getattr(error, "code", rundir.EXIT_CONFIG)
        return 0
    if verb == "stop":
        stop(RunDir(words[0]), words[1])
        return 0
    parser = argparse.ArgumentParser(prog="python -m launch.slurm settle")
    parser.add_argument("run")
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--heard", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--lost", action="store_true")
    given = parser.parse_args(words)
    run = RunDir(given.run)
    verdict = settle(run, code=given.code, heard=set(given.heard.split()), facts=parse(given.job), lost=given.lost)
    _say(f"gearshift: {verdict.reason.rstrip('.')}; {'this job ends' if verdict.action == 'end' else verdict.action}")
    if verdict.action == "end" and verdict.cause not in ("finished", "superseded", "ended by Slurm", "unreachable"):
        _say(f"To go on: gearshift resume {shlex.quote(str(run.path))}")
    print(verdict.action)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
