"""The two ends of a run: from a command to an open run directory, and from the last step to its result.

Owns: the request that came with the command, preparing on the main process, admission, lock and attempt, the frozen
config, the table of what was asked and what is in force, `result.json`, and what a person reads at the end or at a failure.

Does not own: the run in between (`main.py`), the files themselves (`rundir.py`).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import config, data, describe, rundir
from train.config import Config
from train.rundir import RunDir

if TYPE_CHECKING:
    from train.data import Prepared
    from train.strategy import Processes, Strategy
    from train.tasks import Task

log = logging.getLogger(__name__)

LAUNCHED = "GEARSHIFT_ATTEMPT_TOKEN"
"""Set by `gearshift` and the batch script for the ranks they start: they have cleared left-over requests themselves."""


@dataclass(frozen=True)
class Request:
    """What the command said besides the config."""

    step: str | int = "last"
    """Which checkpoint to go on from: `last`, `best` or a step."""
    accept: bool = False
    """Go on although what is learned changes."""


@dataclass
class Opened:
    """An open run, as every rank sees it. The lock is the main process's alone."""

    run: RunDir
    cfg: Config
    attempt: int
    hashes: dict[str, str]
    finished: bool = False
    lock: rundir.Lock | None = None
    asked: str = ""
    """The strategy as it was asked; `cfg` has the one that was planned."""
    plan: dict[str, Any] = field(default_factory=dict)
    """`plan.json`: empty but for a note where nothing could be planned."""
    predicted: dict[str, Any] = field(default_factory=dict)
    """What the run's end is held against."""
    device: Any = None


_opened: Opened | None = None
"""The run of this process, for `fail`; a process runs one."""


def prepare(cfg: Config, procs: Processes) -> Prepared:
    """Prepared data on every rank: made by the main process first, then found by the others."""
    if not procs.is_main:
        procs.from_main(lambda: None)
        return data.prepare(cfg, lambda _: None)

    def first() -> None:
        data.prepare(cfg, lambda text: print(text, flush=True))

    procs.from_main(first)
    return data.prepare(cfg, lambda _: None)


def open_run(cfg: Config, prepared: Prepared, request: Request, procs: Processes) -> Opened:
    """Admit the command to its run directory, own it, and freeze what will run. Collective.

    Raises RunError where the directory belongs to another experiment or another live process.
    """
    from train import metrics
    from train.strategy import Mismatch, precision_of

    locks: list[rundir.Lock] = []

    def on_main() -> dict[str, Any]:
        run = rundir.resolve(cfg, config.math_hash(cfg, prepared.fingerprints))
        identity = rundir.admit(cfg, run, prepared.fingerprints, accept=request.accept)
        result = run.result() or {}
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if again and result.get("status") == "failed" and (result["reason"] or "").startswith(rundir.FINAL):
            raise rundir.RunError(f"not started again: {result['reason']}", rundir.exit_code(result))
        opened = {"path": str(run.path), "math_hash": identity.math_hash, "exec_hash": identity.exec_hash}
        if result.get("status") == "finished" and not identity.changes and request.step == "last":
            print(describe.show_result(run), flush=True)
            return {**opened, "finished": True, "attempt": result["attempt"], "precision": identity.precision}
        run.create()
        lock = rundir.Lock.acquire(run, say=lambda text: print(text, flush=True))
        locks.append(lock)
        if LAUNCHED not in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            _clear_stale_requests(run)
        frozen: Any = identity.precision  # one of the config's words, read back from the directory
        word = replace(cfg, train=replace(cfg.train, precision=frozen))
        identity = replace(identity, precision=precision_of(word, procs.device))
        rundir.freeze(cfg, run, identity, lock.attempt)
        _keep_data_facts(run, prepared)
        rundir.atomic_write(run.env, rundir.to_json(describe.env_info(), indent=2))
        run.write_result("running", lock.attempt, math_hash=identity.math_hash, exec_hash=identity.exec_hash)
        return {**opened, "finished": False, "attempt": lock.attempt, "precision": identity.precision}

    answer = procs.from_main(on_main)
    if len(set(procs.gather(config.exec_hash(cfg)))) > 1:
        raise Mismatch("the ranks were started with different configs")
    settled = replace(cfg, train=replace(cfg.train, precision=answer["precision"]))
    global _opened
    hashes = {"math_hash": answer["math_hash"], "exec_hash": answer["exec_hash"]}
    lock = locks[0] if locks else None
    _opened = Opened(RunDir(answer["path"]), settled, answer["attempt"], hashes, answer["finished"], lock)
    if not _opened.finished:
        metrics.start_logging(_opened.run, procs.rank)
    return _opened


def lay_out(opened: Opened, prepared: Prepared, procs: Processes) -> Config:
    """The config with the layout of the plan, which the main process makes for the ranks that there are and shares.

    Raises DoesNotFit where nothing fits, unless `run.fit=warn`.
    """
    from train import metrics
    from train.config import StrategyConfig
    from train.plan.choose import choose, on_ranks

    cfg, device = opened.cfg, procs.device.type
    local = int(os.environ.get("LOCAL_WORLD_SIZE", procs.world_size))

    def on_main() -> dict[str, Any]:
        here = on_ranks(cfg, world_size=procs.world_size, local_world_size=local, device=device)
        choice = choose(here, prepared.info, take=device != "cpu" or _large(cfg, prepared))
        rundir.atomic_write(opened.run.plan, rundir.to_json(choice.to_dict(), indent=1))
        return {"strategy": asdict(choice.strategy), "plan": choice.to_dict()}

    answer = procs.from_main(on_main)
    opened.asked, opened.plan, opened.device = cfg.strategy.name, answer["plan"], procs.device
    if opened.plan.get("step_s"):
        opened.predicted = {key: opened.plan[key] for key in ("step_s", "tokens_per_s")}
        # A CPU's measure is of the whole process: what it holds before there is a model is no part of the plan.
        before = 0.0 if device == "cuda" else metrics.memory_gib(procs.device)
        opened.predicted["peak_memory_gib"] = opened.plan["allocated_gib"] + before
    opened.cfg = replace(cfg, strategy=StrategyConfig(**answer["strategy"]))
    return opened.cfg


def _large(cfg: Config, prepared: Prepared) -> bool:
    """Whether weights, gradients and optimizer state take a GiB or more. On a CPU, a trace of less costs more than it tells."""
    from train import models, tasks

    if cfg.model.path is not None:
        path = Path(cfg.model.path).expanduser()
        return not path.is_dir() or sum(file.stat().st_size for file in path.rglob("*.*")) > 2**28
    with models.parameters_on_meta():
        module = tasks.TASKS[cfg.task.name](cfg, prepared).build_model()
    return 16 * sum(p.numel() for p in module.parameters()) >= 2**30


def preflight(cfg: Config, engine: Strategy, task: Task, batches: list[Any], procs: Processes) -> None:
    """One step at a learning rate of 0 before the first, so that what does not fit ends here; it leaves no trace.

    batches: a rank's micro-batches of one step. All batches of a run have one shape, so these are as large as any. Two of
    them hold what all would: the first leaves gradients beside which the second runs.
    """
    from train import models, strategy

    fault(0, engine, procs)
    some = batches if cfg.numerics == "exact" or len(batches) < 2 else [batches[0], batches[-1]]
    for i, batch in enumerate(some):
        with models.keyed(engine.module, batch, cfg.seed), engine.micro_step(last=i == len(some) - 1):
            engine.backward(task.loss(engine.model, batch)[0] * (engine.scale / cfg.train.global_batch_size))
    with suppress(strategy.NonFinite):  # the first real step will say so, if it is true of that one
        engine.step(0.0)
    engine.take_loss()
    engine.forget()


FAULT = "GEARSHIFT_FAULT"
"""For tests: `oom:STEP:MICRO` is out of memory on the last rank in that step (0: preflight), if its micro-batch is larger."""


def fault(step: int, engine: Strategy, procs: Processes) -> None:
    """Be out of memory, where a test asks for it."""
    import torch

    kind, _, rest = os.environ.get(FAULT, "").partition(":")
    at, _, micro = rest.partition(":")
    last = procs.rank == procs.world_size - 1
    if kind == "oom" and last and step == int(at) and engine.micro_batch_size > int(micro):
        raise torch.OutOfMemoryError(f"injected by {FAULT}")


def _keep_data_facts(run: RunDir, prepared: Prepared) -> None:
    """So that `predict`, `export` and another run can use the model where the data is not."""
    facts = {"kind": prepared.kind, "fingerprints": prepared.fingerprints, "info": prepared.info}
    rundir.atomic_write(run.data, rundir.to_json(facts, indent=1))
    if "tokenizer" in prepared.info:
        from train.data import tokenizer

        tokenizer.save(Path(prepared.info["tokenizer"]), run.tokenizer)


def _clear_stale_requests(run: RunDir) -> None:
    """Take away a STOP that is older than the launch: it was meant for an earlier command."""
    if run.stop.exists() and run.stop.stat().st_mtime < _launched_at():
        run.clear_requests()


LAUNCHERS = {"accelerate", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}


def _launched_at() -> float:
    """When this process was started, or the launcher that did so; seconds since 1970, up to 10 ms early.

    The kernel counts starts from boot and tells the time of boot in whole seconds, so the age of a process is taken
    instead: a STOP of half a second ago would otherwise count as newer than the command that follows it.
    """
    import psutil

    process = psutil.Process()
    with suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if LAUNCHERS & {Path(word).name for word in parent.cmdline()[:3]}:
            process = parent
    if sys.platform == "linux" and (ticks := rundir.process_start(process.pid)):
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK"))
    return process.create_time()


def counters() -> dict[str, Any]:
    """What a run counts besides its step; saved with every checkpoint, so plain JSON numbers."""
    return {
        "samples": 0,
        "targets": 0,
        "updates": 0,
        "skipped": 0,
        "wall_s": 0.0,
        "best": None,
        "best_step": None,
        "bad_evals": 0,
    }


def objective(cfg: Config, task: Any) -> str:
    """The metric that is judged. Raises ConfigError before anything is trained if the task does not give it."""
    metric = cfg.eval.metric or task.objective
    if metric not in task.directions:
        known = ", ".join(task.directions)
        raise config.ConfigError(
            [f"eval.metric={metric}: {cfg.task.name} measures {known} here; set eval.metric to one of them."]
        )
    return metric


def due(wish: str | None, counters: dict[str, Any], cfg: Config, procs: Processes) -> str | None:
    """Why a run that goes on from a checkpoint need not make a step. Collective. wish: of this rank."""
    if cfg.eval.patience is not None and counters["bad_evals"] >= cfg.eval.patience:
        return f"eval.patience={cfg.eval.patience}"
    return next((reason for reason in procs.gather(wish) if reason is not None), None)


def count_skipped(cfg: Config, counters: dict[str, Any], grad_norm: float | None) -> None:
    """Note a step's gradient norm: None is a step that was skipped. Raises NonFinite above the cap."""
    from train.strategy import NonFinite

    if grad_norm is not None:
        counters["skipped"] = 0
        return
    counters["skipped"] += 1
    if counters["skipped"] > cfg.train.nonfinite_cap:
        raise NonFinite(f"{counters['skipped']} steps in a row (train.nonfinite_cap={cfg.train.nonfinite_cap})")


def judge(counters: dict[str, Any], value: float | None, step: int, *, higher: bool) -> bool:
    """Note an evaluation's objective; whether it is the best so far."""
    best = counters["best"]
    improved = (
        value is not None and math.isfinite(value) and (best is None or (value > best if higher else value < best))
    )
    if improved:
        counters.update(best=value, best_step=step, bad_evals=0)
    else:
        counters["bad_evals"] += 1
    return improved


def announce(cfg: Config, opened: Opened, prepared: Prepared, in_force: dict[str, Any], *, step: int, total_steps: int,
             parameters: tuple[int, int], saved: Any) -> None:  # fmt: skip
    """Say on the main process what is about to run, asked beside got."""
    run, G = opened.run, cfg.train.global_batch_size
    opened.run.event("start" if saved is None else "resume", attempt=opened.attempt, step=step,
                     parent=saved.manifest["attempt"] if saved else 0,  # who saved what this attempt goes on from
                     exec_hash=opened.hashes["exec_hash"], world_size=in_force["world_size"],
                     total_steps=total_steps)  # fmt: skip
    trained, total = parameters
    asked = in_force["asked"]
    beside = {k: v for k, v in in_force.items() if v is not None and k not in ("asked", *asked)}
    unit = f" x {cfg.data.seq_len} tokens" if cfg.task.name == "causal_lm" else ""
    lines = [
        f"run {run.path.name}  attempt {opened.attempt}  math {opened.hashes['math_hash'][:8]}  "
        f"exec {opened.hashes['exec_hash'][:8]}",
        f"  model      {cfg.model.path or cfg.model.name}: {trained:,} trained of {total:,} parameters",
        f"  data       {', '.join(f'{n:,}' for n in prepared.info['train_samples'])} samples, "
        f"{prepared.info['val_samples']:,} for validation",
        f"  step       {G} samples{unit} = micro-batch {in_force['micro_batch_size']} x "
        f"{in_force['gradient_accumulation_steps']} accumulated x {in_force['world_size']} ranks",
        f"  typed      strategy={opened.asked}",
        "  planned    " + describe.planned(opened.plan),
        f"  {'':<30}{'asked':<12}in force",
        *(f"    {key:<28}{value!s:<12}{in_force[key]}" for key, value in asked.items()),
        "  and        " + " ".join(f"{k}={v}" for k, v in beside.items()),
        f"  duration   {total_steps:,} steps" + (f", from step {step:,}" if step else ""),
    ]
    if cfg.numerics == "exact":
        lines.append(
            "  exact      one forward per sample and gradients summed along one tree: expect 1.2 to 2 times the time of a step"
        )
    print("\n".join(lines), flush=True)


def conclude(opened: Opened, procs: Processes, prepared: Prepared, *, status: str, reason: str | None, step: int,
             counters: dict[str, Any], in_force: dict[str, Any], metric: str, evaluation: dict[str, float],
             measured: dict[str, Any], state_hash: str | None, tracker: Any) -> None:  # fmt: skip
    """Write `result.json`, which is trusted before any exit code, and show it. Every rank calls; the main process acts."""
    if not procs.is_main:
        return
    run, tokens = opened.run, None
    if opened.cfg.task.name == "causal_lm":
        tokens = counters["samples"] * opened.cfg.data.seq_len
    run.event("stop" if status == "stopped" else "end", attempt=opened.attempt, step=step, status=status, reason=reason)
    run.write_result(
        status, opened.attempt, reason=reason, objective=counters["best"], metric=metric, steps=step,
        samples=counters["samples"], tokens=tokens, wall_s=round(counters["wall_s"], 3), **opened.hashes,
        state_hash=state_hash, engine=in_force, predicted=opened.predicted, measured=measured, eval=evaluation,
        baselines=prepared.info.get("baselines", {}), sample=_last_sample(run),
    )  # fmt: skip
    tracker.close({"status": status, "objective": counters["best"], **evaluation})
    if opened.lock is not None:
        opened.lock.release()
    print("\n" + describe.show_result(run), flush=True)


def _last_sample(run: RunDir) -> str | None:
    """The newest text that the model wrote, for the end of the run."""
    texts = sorted(run.samples.glob("step-*/*.txt"))
    return texts[-1].read_text(errors="replace")[:2000] if texts else None


def explain(error: Exception) -> tuple[int, str]:
    """(exit code, reason for `result.json`) of what ended a run, after telling it. Only the unexpected gets a traceback."""
    from train import checkpoint, metrics, models, strategy

    metrics.close_console()
    if isinstance(error, strategy.MainFailed):  # the main process tells it
        return 1, "main process failed"
    if isinstance(error, data.DataError | models.ModelError):
        code, reason = rundir.EXIT_CONFIG, "bad_config"
    elif isinstance(error, rundir.RunError):
        classified = {code: word for word, code in rundir.CLASSIFIED.items() if code != rundir.EXIT_CONFIG}
        code, reason = error.code, classified.get(error.code, str(error).splitlines()[0])
    elif isinstance(error, strategy.Mismatch):
        code, reason = 1, f"asked and got differ: {error}"
    elif isinstance(error, strategy.NonFinite):
        code, reason = 1, f"non-finite: {error}"
    elif isinstance(error, checkpoint.CheckpointError | OSError):
        code, reason = 1, f"{type(error).__name__}: {error}"
    elif strategy.out_of_memory(error):
        code, reason = rundir.EXIT_MEMORY, "out_of_memory"
        _tell_memory(error)
    else:
        log.exception("the run failed")
        return 1, describe.scrub(f"{type(error).__name__}: {error}")[:500]
    log.error("%s", error if code in (rundir.EXIT_CONFIG, rundir.EXIT_FIT) else reason)
    return code, describe.scrub(reason)


def _tell_memory(error: Exception) -> None:
    """What was predicted beside what was held when memory ran out, and what would need less. Any rank; it needs no other."""
    from train import metrics

    if _opened is None or _opened.device is None:
        return
    held = metrics.memory_gib(_opened.device)
    rank = int(os.environ.get("RANK", "0"))
    text = describe.out_of_memory(_opened.plan, held, f"rank {rank}: {error}")
    _opened.run.event("oom", attempt=_opened.attempt, reason="out_of_memory", rank=rank, measured_gib=held,
                      predicted_gib=_opened.plan.get("memory_gib"), lighter=_opened.plan.get("lighter"))  # fmt: skip
    print(text, file=sys.stderr, flush=True)


def fail(reason: str) -> None:
    """Write down that this process's run failed: in `result.json` if it is the main process, else where that finds it."""
    if _opened is None:
        return
    run, attempt = _opened.run, _opened.attempt
    try:
        if _opened.lock is None:
            return run.event("failure", attempt=attempt, rank=int(os.environ.get("RANK", "0")), reason=reason)
        reason = run.failure(attempt, reason)
        _opened.lock.check()
        run.event("end", attempt=attempt, status="failed", reason=reason)
        run.write_result("failed", attempt, reason=reason, **_opened.hashes)
        _opened.lock.release()
    except (rundir.LockLost, OSError) as error:
        log.error("the failure could not be written down: %s", error)
