"""Stands in for training where only a run's life is tested: the protocol of the run directory, without torch.

Its state is a hash that every step changes, so a lost or repeated step shows in the end. The plan (a JSON file) says
how many steps there are, how long one takes, when it saves, and what goes wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train import config, rundir
from train.rundir import RunDir


def advance(state: str, step: int) -> str:
    return hashlib.sha256(f"{state} {step}".encode()).hexdigest()


def final_state(steps: int) -> str:
    state = ""
    for step in range(1, steps + 1):
        state = advance(state, step)
    return state


def main() -> int:
    plan = {"steps": 60, "step_s": 0.1, "every": 10, **json.loads(Path(sys.argv[1]).read_text())}
    words = sys.argv[2:]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if "--config" in words:
        cfg = config.load(words[words.index("--config") + 1], overrides)
    else:
        cfg = config.compose(overrides)
    run = RunDir(Path(cfg.run.root) / cfg.run.name)
    signalled: list[str] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: signalled.append(signal.Signals(n).name))
    if os.environ.get("SLURM_NODEID", "0") != "0":  # the other nodes leave when the first has
        before = [event["after"] for event in rundir.read_jsonl(run.events) if event["kind"] == "launch"][-1]
        while (result := run.result() or {}).get("attempt", 0) <= before or result["status"] == "running":
            time.sleep(0.1)
        return 0
    time.sleep(plan.get("import_s", 0))
    lock = rundir.Lock.acquire(run, heartbeat_s=1.0)
    run.write_result("running", lock.attempt)
    commits = sorted(run.checkpoints.glob("step-*/manifest.json"))
    step, state = (
        (int(commits[-1].parent.name[5:]), json.loads(commits[-1].read_bytes())["state"]) if commits else (0, "")
    )
    cores = sorted(os.sched_getaffinity(0))
    run.event("resume" if commits else "start", attempt=lock.attempt, step=step, nodes=cfg.hardware.nodes, cores=cores)

    def save() -> None:
        time.sleep(plan.get("save_s", 0))
        lock.check()
        if run.checkpoint(step).exists():
            return
        beside = run.checkpoints / f".{step}.{os.getpid()}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        (beside / "manifest.json").write_text(json.dumps({"state": state}))
        beside.rename(run.checkpoint(step))

    while step < plan["steps"]:
        step += 1
        state = advance(state, step)
        rundir.append_line(run.ledger, {"step": step, "attempt": lock.attempt, "state": state})
        if step == plan.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == plan.get("fail_at") and cfg.seed == plan.get("fail_seed", cfg.seed):
            run.write_result("failed", lock.attempt, reason=plan["fail_reason"])
            lock.release()
            return 1
        reason = f"signal {signalled[0]}" if signalled else run.stop_reason()
        if step == cfg.run.stop_at:
            reason = f"run.stop_at={step}"
        if reason and step < plan["steps"]:
            save()
            run.write_result("stopped", lock.attempt, reason=reason, steps=step)
            lock.release()
            return 0
        if step % plan["every"] == 0:
            save()
        time.sleep(plan["step_s"])
    save()
    run.event("end", attempt=lock.attempt, step=step)
    measured = {"metric": "eval_loss", "objective": 1 / (1 + cfg.seed)}
    run.write_result("finished", lock.attempt, steps=step, state_hash=state, **measured)
    lock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
