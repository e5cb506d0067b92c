"""The record of which samples were consumed, and the proof that none was lost or repeated.

Owns: `ledger.jsonl` (a line per completed step) and its check against the order. The digest in a line is the sum of the
sample keys that travelled with the tensors into the model, over all ranks; it is not recomputed from the order. So a
loader that fed one wrong sample is found by comparing the two.

Does not own: the order (`order.py`), or which steps a checkpoint committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import rundir

if TYPE_CHECKING:
    from train.order import Order

MASK63 = (1 << 63) - 1


def append(path: Path, step: int, order: Order, *, digest: int, ranks: int, attempt: int, skipped: bool) -> None:
    """A line for the completed step `step`. digest: int64 sum of the keys that went into the model, over all ranks."""
    positions = order.positions(step - 1)
    record = {"step": step, "first": positions[0], "last": positions[-1], "digest": digest & MASK63,
              "sources": order.counts(step - 1), "ranks": ranks, "attempt": attempt}  # fmt: skip
    rundir.append_line(path, {**record, "skipped": True} if skipped else record)


def effective(records: list[dict[str, Any]], resumed: dict[int, int]) -> dict[int, dict[str, Any]]:
    """The line that counts for each step. resumed: attempt -> the step it resumed from (0 for a fresh start).

    Lines of earlier attempts above the step that a later attempt resumed from are void: that state was lost with its
    process, and the steps were done again.
    """
    truth: dict[int, dict[str, Any]] = {}
    attempt = 0
    for record in records:
        if record["attempt"] != attempt:
            attempt = record["attempt"]
            base = resumed.get(attempt, 0)
            truth = {step: old for step, old in truth.items() if step <= base}
        truth[record["step"]] = record
    return truth


def check(records: list[dict[str, Any]], resumed: dict[int, int], order: Order, last_step: int) -> list[str]:
    """What is wrong with the ledger up to `last_step`, step by step; empty when every sample was used exactly once.

    order: an `order.Order` of the run. A step's line must exist, own exactly the positions of the step, and carry the
    digest of exactly the samples that the order gives to it.
    """
    from train.order import digest, key

    problems = []
    truth = effective(records, resumed)
    for step in range(1, last_step + 1):
        record = truth.get(step)
        positions = order.positions(step - 1)
        if record is None:
            problems.append(
                f"step {step}: no line; positions {positions.start} to {positions.stop - 1} are not accounted for"
            )
            continue
        if (record["first"], record["last"]) != (positions.start, positions.stop - 1):
            problems.append(f"step {step}: positions {record['first']} to {record['last']}, expected "
                            f"{positions.start} to {positions.stop - 1}")  # fmt: skip
        samples = order.ids(step - 1)
        if record["digest"] != digest(key(samples.source, samples.index, samples.epoch)):
            problems.append(f"step {step}: other samples went into the model than the order gives to it")
    return problems
