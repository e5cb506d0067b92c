"""A sweep: many runs of one command, each an ordinary run in a process tree of its own, or a task of one Slurm array.

Owns: Hydra's multirun with the launcher below, `sweep.json` and the numbers of its jobs, which jobs run at once on
which devices, and what the same command does the next time: finished jobs are kept, stopped ones go on, the rest start.

Does not own: a single run (`cli.py`, `local.py`), a Slurm job (`slurm.py`), the grammar of `lr=1e-4,3e-4` (Hydra).

A sweep never trains in this process. It may be killed at any instant: its jobs then save and leave (each is told when
its parent is gone), and they hold a lock that the next start of the sweep waits for.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from launch import local, slurm
from train import config, describe, rundir
from train.config import HOW, WATCHED, WHERE, Config, ConfigError
from train.rundir import RunDir

PLUGIN_MODULE = "hydra_plugins.gearshift"
"""Hydra takes launchers from below `hydra_plugins` only, so ours says that it lives there."""
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass
class Job:
    """One run of a sweep. Its number, and so its directory, never changes."""

    number: int
    overrides: list[str]
    status: str = "waiting"
    """`waiting`, `running`, `finished`, `stopped`, `failed`, `infeasible` (the plan says it cannot fit)."""
    reason: str | None = None
    objective: float | None = None
    metric: str | None = None

    @property
    def name(self) -> str:
        return f"{self.number:03d}"


@dataclass
class Sweep:
    """A directory of jobs: `<run.root>/<name>/{sweep.json, 000, 001, ...}`."""

    path: Path
    options: list[str]
    """`--plugin` and `--config-dir` of the command, handed to every job."""
    jobs: list[Job] = field(default_factory=list)

    def run(self, job: Job) -> RunDir:
        return RunDir(self.path / job.name)

    def write(self) -> None:
        record = {"name": self.path.name, "options": self.options, "jobs": [asdict(job) for job in self.jobs]}
        rundir.atomic_write(self.path / "sweep.json", json.dumps(record, indent=1) + "\n")

    def add(self, lists: Sequence[Sequence[str]]) -> list[Job]:
        """The jobs of these override lists: known ones with the numbers they have, new ones after them."""
        known = {tuple(job.overrides): job for job in self.jobs}
        found = []
        for overrides in lists:
            job = known.get(tuple(overrides)) or Job(len(self.jobs), list(overrides))
            if tuple(overrides) not in known:
                known[tuple(overrides)] = job
                self.jobs.append(job)
            found.append(job)
        return found


def read(path: Path) -> Sweep | None:
    """The sweep in a directory, with each job's state as its run directory tells it; None if there is none."""
    try:
        record = json.loads((path / "sweep.json").read_bytes())
    except FileNotFoundError:
        return None
    sweep = Sweep(path, record["options"], [Job(**job) for job in record["jobs"]])
    for job in sweep.jobs:
        look(sweep, job)
    return sweep


def look(sweep: Sweep, job: Job) -> None:
    """Bring a job's state up to what its run directory says; a job without a result keeps the state it has."""
    run = sweep.run(job)
    result = run.result()
    if result is None:
        if job.status == "running" and rundir.alive(rundir.holder(run)) is False:
            job.status = "waiting"
        return
    alive = rundir.alive(rundir.holder(run)) is not False
    job.status = "stopped" if result["status"] == "running" and not alive else result["status"]
    if result["status"] == "failed" and result.get("reason") == "does_not_fit":
        job.status = "infeasible"
    job.reason, job.objective, job.metric = result.get("reason"), result.get("objective"), result.get("metric")


# ------------------------------------------------------------------------------------------------- Hydra's multirun


def run(
    overrides: Sequence[str],
    *,
    plugin: str | None = None,
    config_dir: str | None = None,
    dry_run: bool = False,
    wait: bool = False,
    say: Callable[[object], None] = print,
) -> int:
    """Run the sweep that `overrides` describe, in Hydra's grammar; 0 if every job finished, 75 if it was stopped, else 1.

    `run.name` and `run.root`, where given, name the sweep. Raises ConfigError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = shlex.join(["gearshift", "run", "-m", *overrides])
        raise ConfigError(
            ["-m starts a sweep, which is not started inside of a launch of several ranks: each would run all of it.\n"
             f"Type instead:  {command}"]
        )  # fmt: skip
    options = (["--plugin", plugin] if plugin else []) + (["--config-dir", config_dir] if config_dir else [])
    task = _Task(options, dry_run, wait, say)
    _multirun(overrides, config_dir, task)
    return task.code


@dataclass
class _Task:
    """What the launcher, which Hydra makes, must know of the command."""

    options: list[str]
    dry_run: bool
    wait: bool
    say: Callable[[object], None]
    sweep: Sweep | None = None
    code: int = 0


def _multirun(overrides: Sequence[str], config_dir: str | None, task: _Task) -> None:
    """Hydra's own multirun, with our launcher instead of the one that runs jobs in this process."""
    import tempfile

    from hydra import main as hydra_main
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    _register(task)
    ConfigStore.instance().store(name="schema", node=config.to_dict(Config()), provider="gearshift")
    words = [
        "hydra/launcher=gearshift",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    if not any(_key(word) == "hydra/sweeper" for word in overrides):
        words.append("hydra/sweeper=gearshift")
    if config_dir is not None:
        words.append(f"hydra.searchpath=[{_quoted('file://' + str(Path(config_dir).resolve()))}]")
    former = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are
    try:
        with tempfile.TemporaryDirectory() as scratch:  # Hydra's record of a multirun; ours is sweep.json
            sys.argv = ["gearshift", "--multirun", *words, f"hydra.sweep.dir={scratch}", *overrides]
            hydra_main(config_path=str(config.CONF), config_name="config", version_base="1.3")(_never)()
    except HydraException as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    except SystemExit as error:
        raise ConfigError([f"{shlex.join(overrides)}: Hydra refused it; its reason is above"]) from error
    finally:
        sys.argv, os.environ["HYDRA_FULL_ERROR"] = former


def _never(cfg: Any) -> None:
    raise AssertionError("a job of a sweep is a process of its own")


def _register(task: _Task) -> None:
    """Give Hydra our launcher: a class below `hydra_plugins`, and a config that names it."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.core.utils import JobReturn, JobStatus, filter_overrides
    from hydra.plugins.launcher import Launcher as Base
    from omegaconf import OmegaConf

    plugins = Plugins.instance()  # imports Hydra's own once more, so theirs are looked up after it
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    class Sweeper(BasicSweeper):
        """Hydra's own, without its composition of every job: ours follows and says more."""

        def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
            pass

    class Launcher(Base):
        """One process tree per job; see the module."""

        def __init__(self, slots: int | None = None) -> None:
            self.slots = slots
            self.config: Any = None

        def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
            self.config = config

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            hydra, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # so that configs can be composed
            try:
                jobs = _jobs(task, [list(filter_overrides(list(words))) for words in job_overrides], self.slots)
            finally:
                GlobalHydra.instance().hydra = hydra
            ours = self.config.hydra.sweeper._target_ == f"{PLUGIN_MODULE}.Sweeper"
            returns = []
            for job, words in zip(jobs, job_overrides, strict=True):
                done = JobReturn(overrides=list(words), cfg=OmegaConf.create({}), hydra_cfg=self.config)
                done.status, done.return_value = JobStatus.COMPLETED, job.objective
                if job.status in ("failed", "infeasible") and not ours:  # a sweeper that optimises has its own policy
                    failure = RuntimeError(f"job {job.name} {job.status}: {job.reason}")
                    done.status, done.return_value = JobStatus.FAILED, failure
                returns.append(done)
            return returns

    try:
        import hydra_plugins
    except ImportError:
        hydra_plugins = ModuleType("hydra_plugins")
        hydra_plugins.__path__ = []
        sys.modules["hydra_plugins"] = hydra_plugins
    module = ModuleType(PLUGIN_MODULE)
    sys.modules[PLUGIN_MODULE] = hydra_plugins.gearshift = module
    nodes = {"launcher": (Launcher, {"slots": None}), "sweeper": (Sweeper, {"max_batch_size": None, "params": None})}
    for group, (cls, node) in nodes.items():
        cls.__module__, cls.__qualname__ = PLUGIN_MODULE, cls.__name__
        setattr(module, cls.__name__, cls)
        plugins.register(cls)  # type: ignore[arg-type]
        node = {"_target_": f"{PLUGIN_MODULE}.{cls.__name__}", **node}  # type: ignore[dict-item]
        ConfigStore.instance().store(group=f"hydra/{group}", name="gearshift", node=node, provider="gearshift")


def _quoted(text: str) -> str:
    """A word as the value of an override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# ------------------------------------------------------------------------------------------------- a batch of jobs


def _jobs(task: _Task, lists: list[list[str]], slots: int | None) -> list[Job]:
    """Find or make the sweep of these override lists, and run what is left of it."""
    sweep, jobs = _find(lists, task.options, task.sweep)
    task.sweep = sweep
    configs = _configs(sweep, jobs)
    if task.dry_run:
        for job in jobs:
            task.say(shlex.join(_command(sweep, job)))
        return jobs
    lock = _Lock(sweep, task.say)
    try:
        if any(cfg.slurm.name != "none" for cfg in configs.values()):
            task.code = _submit(task, sweep, jobs, configs)
        else:
            task.code = _Parallel(sweep, configs, slots, lock, task.say).all(jobs)
    finally:
        lock.file.close()
    task.say(table(sweep))
    return jobs


def _find(lists: Sequence[Sequence[str]], options: list[str], sweep: Sweep | None = None) -> tuple[Sweep, list[Job]]:
    """The sweep of these override lists, known or new, and its jobs in their order."""
    place = [word for word in lists[0] if _key(word) in ("run.root", "run.name")]
    lists = [[word for word in words if _key(word) not in ("run.root", "run.name")] for words in lists]
    if sweep is None:
        first = config.compose([*lists[0], *place], **_composing(options))
        describe.refuse_secrets(first)  # `sweep.json` has every override
        path = RunDir(Path(first.run.root) / (first.run.name or f"{first.experiment}-{_digest(lists)}")).path
        sweep = read(path) or Sweep(path, options)
    return sweep, sweep.add(lists)


def array_task(overrides: Sequence[str], options: list[str], number: int) -> list[str]:
    """Overrides of one task of `slurm/array.sbatch`: job `number` of the sweep that `overrides` describe.

    Raises ConfigError if there is no such job.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    lists = BasicSweeper.split_arguments(parsed, None)[0]
    if number >= len(lists):
        raise ConfigError(
            [f"--array has a task {number}, and this sweep has {len(lists)} jobs: use --array=0-{len(lists) - 1}"]
        )
    sweep, jobs = _find(lists, options)
    if not (sweep.path / "sweep.json").exists():
        rundir.make_directory(sweep.path)
        sweep.write()
    return [*jobs[number].overrides, *_place(sweep, jobs[number])]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _composing(options: list[str]) -> dict[str, str]:
    """`--plugin` and `--config-dir` as arguments of `config.compose`."""
    return {name[2:].replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=True)}


def _digest(lists: Sequence[Sequence[str]]) -> str:
    """Eight hex digits of the jobs' overrides, without those of where, how and watched that all jobs share: on another
    machine it is the same sweep."""
    aside = {word for word in lists[0] if _key(word).split(".")[0] in (*WHERE, *HOW, *WATCHED)}
    aside = aside.intersection(*lists)
    kept = [[word for word in words if word not in aside] for words in lists]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8]


def _configs(sweep: Sweep, jobs: Sequence[Job]) -> dict[int, Config]:
    """Each job's config. A job whose config is bad has failed; where all are bad, raises ConfigError."""
    configs, error = {}, None
    for job in jobs:
        try:
            cfg = config.compose(job.overrides, **_composing(sweep.options))
            configs[job.number] = replace(cfg, run=replace(cfg.run, root=str(sweep.path), name=job.name))
        except ConfigError as problem:
            error = problem
            job.status, job.reason = "failed", "; ".join(problem.problems)
    if error is not None and not configs:
        raise error
    return configs


def _command(sweep: Sweep, job: Job) -> list[str]:
    """One job by hand, as this process starts it."""
    return [sys.executable, "-m", "launch", "run", *sweep.options, *job.overrides, *_place(sweep, job)]


def _place(sweep: Sweep, job: Job) -> list[str]:
    return [f"run.root={_quoted(str(sweep.path))}", f"run.name='{job.name}'"]


class _Lock:
    """One sweep, one parent. Every job inherits the descriptor, so that the lock outlives a killed parent by its jobs."""

    def __init__(self, sweep: Sweep, say: Callable[[object], None]) -> None:
        rundir.make_directory(sweep.path)
        self.file = (sweep.path / "lock").open("a+")
        waiting = False
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                self.file.seek(0)
                pid, _, started = self.file.read().strip().partition(" ")
                if started and rundir.process_start(int(pid)) == started:
                    raise rundir.RunError(f"{sweep.path} is being run by process {pid} on this machine.") from None
                if not waiting:
                    say(f"{sweep.path}: jobs of a killed parent save and leave; waiting for them")
                waiting = True
                time.sleep(POLL_S)
        self.file.seek(0)
        self.file.truncate()
        self.file.write(f"{os.getpid()} {rundir.process_start(os.getpid())}")
        self.file.flush()


class _Parallel:
    """Jobs on this machine, as many at once as its devices hold; no two share one."""

    def __init__(
        self, sweep: Sweep, configs: dict[int, Config], slots: int | None, lock: _Lock, say: Callable[[object], None]
    ) -> None:
        self.sweep, self.configs, self.lock, self.say = sweep, configs, lock, say
        gpus = local.gpus()
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.free = {
            "gpu": (names.split(",")[:gpus] if names else [str(i) for i in range(gpus)])[:slots],
            "cpu": [str(core) for core in sorted(os.sched_getaffinity(0))[: local.cores()]][:slots],
        }
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes], str, list[str]]] = {}
        self.stopped = False

    def all(self, jobs: Sequence[Job]) -> int:
        """Run what is not finished; the exit code of the sweep."""
        queue = []
        for job in jobs:
            if job.number in self.configs:
                look(self.sweep, job)
                if job.status != "finished":
                    job.status, job.reason = "waiting", None
                    queue.append(job)
        self.sweep.write()
        former = {
            number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }
        try:
            while self.running or (queue and not self.stopped):
                for job in list(queue) if not self.stopped else []:
                    if self._start(job):
                        queue.remove(job)
                time.sleep(POLL_S)
                for number in [n for n, (_, child, _, _) in self.running.items() if child.poll() is not None]:
                    self._ended(number)
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if self.stopped:
            return rundir.EXIT_STOPPED
        return 0 if all(job.status == "finished" for job in jobs) else 1

    def _need(self, job: Job) -> tuple[str, int]:
        """Kind and number of devices: `hardware.devices_per_node`, and one where that is not set."""
        hardware = self.configs[job.number].hardware
        kind = "gpu" if hardware.device in ("auto", "cuda") and local.gpus() else "cpu"
        return kind, hardware.devices_per_node or 1

    def _start(self, job: Job) -> bool:
        kind, need = self._need(job)
        held = [devices for _, _, other, devices in self.running.values() if other == kind]
        have = len(self.free[kind]) + sum(map(len, held))
        if kind == "cpu":
            need = min(need, have)  # more processes than cores are slow, not impossible
        if need > have:
            job.status, job.reason = "infeasible", f"it needs {need} devices and there are {have}"
            self.sweep.write()
            return True
        if need > len(self.free[kind]) or rundir.alive(rundir.holder(self.sweep.run(job))) is True:
            return False
        devices, self.free[kind] = self.free[kind][:need], self.free[kind][need:]
        environment = dict(os.environ)
        if kind == "gpu":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        log = self.sweep.run(job).create().logs / "job.log"
        with log.open("ab") as output:
            child = subprocess.Popen(
                _command(self.sweep, job), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, pass_fds=[self.lock.file.fileno()],
                preexec_fn=_child([int(core) for core in devices] if kind == "cpu" else []),
            )  # fmt: skip
        self.running[job.number] = (job, child, kind, devices)
        job.status = "running"
        self.sweep.write()
        self.say(f"{job.name} on {kind} {','.join(devices)}: {' '.join(_differing(self.sweep, job))}")
        return True

    def _ended(self, number: int) -> None:
        job, child, kind, devices = self.running.pop(number)
        self.free[kind] = sorted(self.free[kind] + devices)
        look(self.sweep, job)
        expected = {0: "finished", rundir.EXIT_STOPPED: "stopped", rundir.EXIT_FIT: "infeasible"}
        if child.returncode not in expected or job.status in ("waiting", "running"):
            job.status = expected.get(child.returncode, "failed")
            job.reason = job.reason or f"exit code {child.returncode}; see {self.sweep.run(job).logs / 'job.log'}"
        self.sweep.write()
        done = sum(job.status == "finished" for job in self.sweep.jobs)
        result = f"{job.metric}={job.objective:.5g}" if job.objective is not None else job.reason or ""
        self.say(f"{job.name} {job.status}  {result}  ({done} of {len(self.sweep.jobs)})")

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        for _, child, _, _ in self.running.values():
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)


def _child(cores: list[int]) -> Callable[[], None]:
    """For Popen: bound to its cores, and told to stop when this process is gone, however that happens (Linux)."""
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl  # loaded here: after a fork as little as possible may happen

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


# ---------------------------------------------------------------------------------------------------- one Slurm array


def _submit(task: _Task, sweep: Sweep, jobs: Sequence[Job], configs: dict[int, Config]) -> int:
    """Prepare, plan and freeze every job that is neither finished nor queued, and submit them as one array.

    Raises ConfigError where jobs ask Slurm for different things: an array has one size.
    """
    from launch import planning
    from train import data
    from train.plan.choose import DoesNotFit

    queue = []
    for job in jobs:
        if job.number not in configs:
            continue
        look(sweep, job)
        run, cfg = sweep.run(job), configs[job.number]
        queued = slurm.state(run)
        if job.status == "finished" or (queued and not queued["over"]):
            continue
        try:
            planning.layout(cfg, data.prepare(cfg, task.say).info, processes=None, dry=True)
        except DoesNotFit as error:
            job.status, job.reason = "infeasible", error.nearest.reason
        except (data.DataError, ConfigError) as error:  # one job's own; the others are submitted
            job.status, job.reason = "failed", str(error)
        else:
            queue.append((job, run, cfg))
    sweep.write()
    if not queue:
        return 0 if all(job.status == "finished" for job in jobs) else 1
    first = queue[0][2]
    if any((cfg.slurm, cfg.hardware) != (first.slurm, first.hardware) for _, _, cfg in queue):
        raise ConfigError(["slurm and hardware differ between the jobs of this sweep; an array has one size of both."])
    numbers = ",".join(str(job.number) for job, _, _ in queue)
    array = numbers + (f"%{first.slurm.array_cap}" if first.slurm.array_cap else "")
    for job, run, cfg in queue:
        slurm.freeze(cfg, run)
        run.clear_requests()
        job.status, job.reason = "waiting", None
    sweep.write()
    script = sweep.path / "array.sbatch"
    plugin = _composing(sweep.options).get("plugin")  # frozen with each job, and to be imported there too
    script.write_text(slurm.render_array(first, sweep.path, array, ["--plugin", plugin] if plugin else []))
    ident = slurm.sbatch(first.slurm.name, script)
    for job, run, _ in queue:
        run.event("submit", job=f"{ident}_{job.number}", slurm=first.slurm.name)
    task.say(f"submitted {len(queue)} jobs as Slurm array {ident} ({array})\n  scancel {ident}")
    if not task.wait:
        return 0
    codes = [slurm.wait_for(run, lambda text: task.say(text)) for _, run, _ in queue]
    for job in jobs:
        look(sweep, job)
    sweep.write()
    return 0 if not any(codes) and all(job.status == "finished" for job in jobs) else 1


# ------------------------------------------------------------------------------------------------------- what it tells


def best(sweep: Sweep) -> Job | None:
    """The finished job with the best objective; None without one."""
    done = [(job.objective, job) for job in sweep.jobs if job.status == "finished" and job.objective is not None]
    if not done:
        return None
    lower = (done[0][1].metric or "").endswith(("loss", "bpb"))
    return (min if lower else max)(done, key=lambda pair: pair[0])[1]


def _differing(sweep: Sweep, job: Job) -> list[str]:
    """The overrides of a job that not all jobs share."""
    shared = set(sweep.jobs[0].overrides).intersection(*(other.overrides for other in sweep.jobs))
    return [word for word in job.overrides if word not in shared]


def table(sweep: Sweep) -> str:
    """A line per job, the best one marked, and the command to go on."""
    from launch import slurm
    from train import describe

    top = best(sweep)
    lines = [f"sweep {sweep.path}"]
    for job in sweep.jobs:
        value = f"{job.metric} {job.objective:.5g}" if job.objective is not None else ""
        words = " ".join(_differing(sweep, job))
        note = "  best" if job is top else f"  {job.reason}" if job.reason and job.status != "finished" else ""
        status, run = job.status, sweep.run(job)
        if status in ("running", "waiting") and run.events.exists():  # how far, or what Slurm says of it
            row = slurm.standing(run, describe.standing(run))
            status = row["state"] if row["state"] != "new" else status
            note = "  " + "  ".join(text for text in describe.standing_text(row)[2:] if text)
        lines.append(f"  {job.name}  {status:<10}  {words:<40}  {value}{note}".rstrip())
    if any(job.status not in ("finished", "infeasible") for job in sweep.jobs):
        lines.append(
            "  The same command again keeps what is finished, goes on with what was stopped, and starts the rest."
        )
    return "\n".join(lines)
