"""The training script: one run, on any number of ranks, from its config to its result.

    python -m train experiment=lm_stdlib                                          one process
    accelerate launch --multi_gpu --num_processes 4 -m train strategy=ddp         four
    gearshift run experiment=pretrain_7b hardware=nodes_2x8x80gb slurm=cluster    a cluster

Read it from top to bottom and you have seen a run. What can be set is in `config.py`; every other module owns one thing
and says so in its first lines. A callback, here, is an `if` in the loop.
"""

from __future__ import annotations

import time

import torch

from train import checkpoint, data, ledger, lifecycle, metrics, models, optim, order, strategy, tasks, trackers
from train.config import Config
from train.data.loader import Loader
from train.stop import Stop, Watchdog


def train(cfg: Config, request: lifecycle.Request) -> None:
    """Run `cfg` until it is finished or asked to stop. Raises what `__main__` turns into a result and an exit code."""
    started = time.monotonic()

    # ---------------------------------------------------------------------------------------------------- Processes
    procs = strategy.start(cfg)
    watch = Watchdog(cfg, procs.rank, procs.world_size, lifecycle.fail)

    # ---------------------------------------------------------------------------------------------- The run directory
    prepared = lifecycle.prepare(cfg, procs)
    opened = lifecycle.open_run(cfg, prepared, request, procs)
    if opened.finished:  # and was shown
        return procs.close()
    cfg, run = lifecycle.lay_out(opened, prepared, procs), opened.run
    stop = Stop(cfg, run.stop, run.save, started=started)
    watch.open(run.logs, opened.attempt)

    # ------------------------------------------------------------------------------------------------- Task and model
    task = tasks.TASKS[cfg.task.name](cfg, prepared)
    metric = lifecycle.objective(cfg, task)
    with models.parameters_on_meta():  # nothing is allocated until the strategy says where; a plug-in's model included
        model = task.build_model()

    # ----------------------------------------------------------------------------------------------------------- Data
    train_sets, val_set = data.open_datasets(prepared, cfg)
    samples_per_step = cfg.train.global_batch_size
    sequence = order.Order([len(d) for d in train_sets], data.weights(cfg), samples_per_step, cfg.seed)
    total_steps = data.total_steps(cfg, [len(d) for d in train_sets])

    # --------------------------------------------------------------------------------------- Strategy and optimizer
    engine = strategy.build(cfg, procs, cfg.train.precision)
    values, blocks = models.initial_values(model, cfg.seed), models.blocks(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = trained, sum(p.numel() for p in model.parameters())
    engine.prepare(model, values, blocks,
                   lambda named: optim.build(named, cfg, device_type=procs.device.type))  # fmt: skip
    in_force = engine.check()  # read from the live objects and compared with what was asked; a difference ends here
    loader = Loader(train_sets, sequence, rank=procs.rank, world_size=procs.world_size, seed=cfg.seed,
                    micro_batch_size=engine.micro_batch_size, device=procs.device, workers=cfg.data.workers)  # fmt: skip

    if cfg.run.preflight if cfg.run.preflight is not None else procs.device.type == "cuda" or engine.settles:
        lifecycle.preflight(cfg, engine, task, list(map(loader.to_device, loader.micro_batches(0))), procs)

    # ---------------------------------------------------------------------------------- Where the weights come from
    # From this run's own checkpoint, if it has one; else they stay what `prepare` has put in place: the weights that
    # `model.path` brings, and the initial values of all the others.
    step, counters = 0, lifecycle.counters()
    saved = checkpoint.newest(run, procs, request.step)
    if saved is not None:
        checkpoint.load(engine, saved)
        step, counters = saved.step, {**counters, **saved.manifest["counters"]}
    saver = checkpoint.Checkpointer(run, procs, engine, cfg.checkpoint, hashes=opened.hashes, lock=opened.lock,
                                    attempt=opened.attempt, saved_step=step if saved else None,
                                    best_step=counters["best_step"])  # fmt: skip
    before = counters["wall_s"]

    # ---------------------------------------------------------------------------------------------- What is watched
    flops = metrics.lm_flops(*parameters, samples_per_step * cfg.data.seq_len) if cfg.task.name == "causal_lm" else None
    meter = metrics.Meter(cfg, run, procs, attempt=opened.attempt, total_steps=total_steps, flops_per_step=flops)
    tracker = trackers.open(cfg, run, opened.attempt, opened.hashes, active=procs.is_main)
    if procs.is_main:
        lifecycle.announce(cfg, opened, prepared, in_force, step=step, total_steps=total_steps, parameters=parameters,
                           saved=saved)  # fmt: skip

    def evaluate() -> dict[str, float]:
        """Metrics over the whole validation set, under the averaged weights where there are any."""
        batches = watch.through(loader.eval_batches(val_set, cfg.eval.max_samples), step, "evaluation")
        with engine.averaged(), torch.no_grad(), engine.autocast():
            found = task.evaluate(engine.model, batches, procs.sum)
            if cfg.eval.samples:
                task.sample(engine.model, step, run.samples / f"step-{step:08d}" if procs.is_main else None)
        return found

    def watched() -> None:
        """Fetch and write what was recorded, and look at it for steps that were not finite."""
        for row in meter.flush():
            tracker.log(row)
            engine.judge(row["grad_norm"])
            lifecycle.count_skipped(cfg, counters, row["grad_norm"])

    # ------------------------------------------------------------------------------------------------------------ Loop
    evaluation: dict[str, float] = {}
    # A run that goes on may be asked to stop already; then it makes no step.
    reason = lifecycle.due(stop.reason(step), counters, cfg, procs) if saved is not None else None
    while step < total_steps and reason is None:
        step, clock = step + 1, time.perf_counter()
        watch.mark(step, "reading data")
        batches = loader.micro_batches(step - 1)
        lifecycle.fault(step, engine, procs)

        # One all-reduce of integers a step, on the host: what carries loss in the whole global batch (the loss is divided
        # by that, so the gradient depends neither on the split nor on padding), what really went into the model (for the
        # ledger), and whether any rank wishes to stop or save (so that all do, at the same step).
        watch.mark(step, "agreeing on counts")
        wish = stop.reason(step)
        tally = [torch.stack([task.count(b), b["weight"].count_nonzero(), b["sample"].sum()]) for b in batches]
        wishes = torch.tensor([wish is not None, stop.save_wanted()], dtype=torch.int64)
        targets, samples, keys, stopping, saving = procs.sum(torch.cat([torch.stack(tally).sum(0), wishes])).tolist()

        for i, batch in enumerate(map(loader.to_device, batches)):
            with models.keyed(engine.module, batch, cfg.seed), engine.micro_step(last=i == len(batches) - 1):
                watch.mark(step, "forward")
                loss_sum, _ = task.loss(engine.model, batch)
                watch.mark(step, "backward")
                if i == 0:  # the next step's samples, while the backward pass runs without the interpreter
                    loader.read_ahead(step)
                # The engine averages gradients over ranks; `scale` undoes exactly that. The count is all that divides.
                engine.backward(loss_sum * (engine.scale / max(targets, 1)))
        watch.mark(step, "update")
        in_force |= engine.check_step(batches)  # of the first: what went through the model is what was asked
        lr = optim.lr(cfg, step, total_steps)
        try:
            grad_norm = engine.step(lr)  # None: not finite on some rank, skipped on all
        except strategy.NonFinite:
            watched()  # the steps that led there
            saver.wait()  # a save under way is of a step before
            raise

        counters["samples"] += samples
        counters["targets"] += targets
        counters["updates"] += grad_norm is not None
        meter.record(step, engine.take_loss(), grad_norm, lr, samples=samples, step_s=time.perf_counter() - clock,
                     data_wait_s=loader.wait_s)  # fmt: skip
        if procs.is_main:
            ledger.append(run.ledger, step, sequence, digest=keys, ranks=procs.world_size, attempt=opened.attempt,
                          skipped=grad_norm is None)  # fmt: skip

        last = step == total_steps
        improved = False
        if last or (cfg.eval.every and step % cfg.eval.every == 0):
            watch.mark(step, "evaluation")
            evaluation = evaluate()
            meter.add_eval(step, evaluation)
            improved = lifecycle.judge(counters, evaluation[metric], step, higher=task.directions[metric])
            if cfg.eval.patience is not None and counters["bad_evals"] >= cfg.eval.patience:
                last, reason = True, f"eval.patience={cfg.eval.patience}"

        if stopping and not last:
            reason = next(r for r in procs.gather(wish) if r is not None)
        due = cfg.checkpoint.every and step % cfg.checkpoint.every == 0
        save = last or reason or due or saving or (improved and cfg.checkpoint.keep_best)
        if save or step % cfg.log.every == 0:  # before a save: no resume begins above a step that has no line
            watched()
        if save:
            watch.mark(step, "saving")
            counters["wall_s"] = before + time.monotonic() - started
            saver.save(step, counters)
            if saving and procs.is_main:
                stop.save_done()
        saver.report("stop" if last or reason else cfg.checkpoint.on_error)
        if last:
            break

    # ---------------------------------------------------------------------------------------------------------- Finish
    watch.mark(step, "finishing")
    saver.wait()
    saver.report("stop")  # nothing is finished, or stopped, whose last state is not on disk
    finished = step == total_steps or (reason or "").startswith("eval.patience")
    if finished and not evaluation:
        evaluation = evaluate()
    lifecycle.conclude(opened, procs, prepared, status="finished" if finished else "stopped", reason=reason, step=step,
                       counters=counters, in_force=in_force, metric=metric, evaluation=evaluation, tracker=tracker,
                       measured=meter.summary(), state_hash=checkpoint.state_hash(engine, procs))  # fmt: skip
    watch.close()
    engine.close()
    procs.close()
