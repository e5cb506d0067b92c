"""The record of which samples were consumed, and the proof that none was lost or repeated.

Owns: `ledger.jsonl` (a line per completed step), its check against the order, and the check of a whole run directory. The
digest in a line is the sum of the sample keys that travelled with the tensors into the model, over all ranks; it is not
recomputed from the order. So a loader that fed one wrong sample is found by comparing the two.

Does not own: the order (`order.py`), or what a checkpoint holds (`checkpoint.py`). Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import rundir
from train.rundir import RunDir

if TYPE_CHECKING:
    from train.order import Order

MASK63 = (1 << 63) - 1


def append(path: Path, step: int, order: Order, *, digest: int, ranks: int, attempt: int, skipped: bool) -> None:
    """A line for the completed step `step`. digest: int64 sum of the keys that went into the model, over all ranks."""
    positions = order.positions(step - 1)
    record = {"step": step, "first": positions[0], "last": positions[-1], "digest": digest & MASK63,
              "sources": order.counts(step - 1), "ranks": ranks, "attempt": attempt}  # fmt: skip
    rundir.append_line(path, {**record, "skipped": True} if skipped else record)


Starts = dict[int, tuple[int, int]]
"""Attempt -> the step it went on from, and the attempt that had saved that step; (0, 0) for a beginning."""


def lineage(starts: Starts, attempt: int, step: int) -> Iterator[tuple[int, range]]:
    """(attempt, its steps) that led to the state which `attempt` saved at `step`, newest first.

    What an attempt did beyond the step that the next one went on from was lost with its process and done again: it is in
    no saved state. An attempt without a beginning in `starts` ends the line.
    """
    while attempt in starts:
        base, parent = starts[attempt]
        yield attempt, range(base + 1, step + 1)
        attempt, step = parent, base


def check(records: list[dict[str, Any]], starts: Starts, order: Order, attempt: int, last_step: int) -> list[str]:
    """What is wrong with the history of the state that `attempt` saved at `last_step`, in the order of the steps.

    Empty when every sample up to there was used exactly once: each step must have exactly one line in the attempt whose
    work the state holds, with exactly the step's positions and the digest of exactly the samples that the order gives it.
    """
    from train.order import digest, key

    doer = {step: number for number, steps in lineage(starts, attempt, last_step) for step in steps}
    lines: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if doer.get(record["step"]) == record["attempt"]:
            lines.setdefault(record["step"], []).append(record)
    problems, missing = [], 0
    for step in range(1, last_step + 1):
        positions, found = order.positions(step - 1), lines.get(step, [])
        if not found:
            missing += 1
            if step == last_step or lines.get(step + 1):
                problems.append(
                    f"{_steps(step - missing + 1, step)}: no line; positions {positions.stop - missing * len(positions)} "
                    f"to {positions.stop - 1} are not accounted for"
                )
                missing = 0
            continue
        record = found[0]
        if len(found) > 1:
            problems.append(f"step {step}: done {len(found)} times in attempt {record['attempt']}; positions "
                            f"{positions.start} to {positions.stop - 1} are repeated")  # fmt: skip
        if (record["first"], record["last"]) != (positions.start, positions.stop - 1):
            problems.append(f"step {step}: positions {record['first']} to {record['last']}, expected "
                            f"{positions.start} to {positions.stop - 1}")  # fmt: skip
        samples = order.ids(step - 1)
        if record["digest"] != digest(key(samples.source, samples.index, samples.epoch)):
            problems.append(f"step {step}: other samples went into the model than the order gives to it")
    return problems


def verify(run: RunDir) -> dict[str, Any]:
    """Read a whole run directory and prove it: every checkpoint whole, every sample up to the newest used exactly once.

    Returns what `gearshift verify --json` prints; `problems` is empty if and only if the run is clean. Raises RunError or
    ConfigError where the directory cannot be read at all.
    """
    from train import checkpoint, config, data
    from train.order import Order

    problems: list[str] = []
    saved: list[dict[str, Any]] = []
    for step in rundir.committed(run):
        path = run.checkpoint(step)
        try:
            reader = checkpoint.Reader(path)
            reader.verify()
            saved.append(reader.manifest)
        except checkpoint.CheckpointError as error:
            if path.exists():  # else the run goes on meanwhile, and has rotated it away
                problems.append(str(error))
    tip = max(saved, key=lambda manifest: (manifest["attempt"], manifest["step"]), default=None)
    steps, attempt = (tip["step"], tip["attempt"]) if tip else (0, 0)
    result = run.result() or {}
    if result.get("status") in ("finished", "stopped") and result["steps"] != steps:
        problems.append(f"result.json is of {_steps(result['steps'])}, the newest checkpoint that is whole of {steps}")

    cfg = config.load(run.path)
    facts = json.loads(run.data.read_bytes()) if run.data.is_file() else {"info": data.prepare(cfg).info}
    order = Order(facts["info"]["train_samples"], data.weights(cfg), cfg.train.global_batch_size, cfg.seed)
    records, events = rundir.read_jsonl(run.ledger), rundir.read_jsonl(run.events)
    try:
        starts = {e["attempt"]: (e["step"], e.get("parent", 0)) for e in events if e["kind"] in ("start", "resume")}
        history = list(lineage(starts, attempt, steps))
        if steps and (not history or history[-1][1].start != 1):
            nameless = starts[history[-1][0]][1] if history else attempt
            problems.append(f"attempt {nameless} has no beginning in {run.events.name}")
        found = check(records, starts, order, attempt, steps)
        changed = [f"attempt {e['attempt']} ({', '.join(e['changes'])})" for e in events if e["kind"] == "math_changed"]
        if found and changed:
            found.append(
                f"what is learned was changed with --accept in {'; '.join(changed)}, and the order perhaps too"
            )
        attempts, ranks = ({record[key] for record in records} for key in ("attempt", "ranks"))
    except (KeyError, TypeError) as error:
        raise rundir.RunError(f"{run.ledger} or {run.events} was changed by hand: a line lacks {error}.") from None
    return {
        "run": str(run.path), "clean": not problems + found, "steps": steps, "positions": steps * order.global_batch_size,
        "attempts": sorted(attempts), "ranks": sorted(ranks), "redone": len(records) - sum(len(s) for _, s in history),
        "checkpoints": [manifest["step"] for manifest in saved], "problems": problems + found,
    }  # fmt: skip


def _steps(first: int, last: int | None = None) -> str:
    return f"step {first}" if last in (None, first) else f"steps {first} to {last}"
