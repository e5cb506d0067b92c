"""Runs of the real script on N ranks, many in one set of processes.

`run_jobs(2, [["strategy=ddp", ...], ["strategy=zero2", ...]])` starts two processes with the environment that torchrun
would give them; in each, every job is composed and trained by `train.main.train`, one after the other, on one process
group. A launch costs 10 seconds of imports; this pays them once. What runs is read from the run directories afterwards.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_jobs(world_size: int, jobs: list[list[str]], *, setup: str = "", timeout_s: float = 600,
             check: bool = True) -> list[str | None]:  # fmt: skip
    """Run every job on `world_size` ranks. Returns the error of each job (None: it ended well), as any rank saw it.

    setup: Python executed in each rank before the first job, for negative controls that break the product on purpose.
    """
    port = free_port()
    processes = []
    for rank in range(world_size):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "WANDB_MODE": "disabled"}  # fmt: skip
        command = [sys.executable, str(Path(__file__)), json.dumps(jobs), setup]
        processes.append(
            subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout_s))
    finally:
        for process in processes:
            process.kill()
    errors: list[str | None] = [None] * len(jobs)
    for process, (out, err) in zip(processes, outputs, strict=True):
        lines = [line for line in out.splitlines() if line.startswith("JOBS ")]
        if not lines:
            raise RuntimeError(f"a rank died ({process.returncode}):\n{err[-4000:]}\n{out[-2000:]}")
        for i, error in enumerate(json.loads(lines[-1][5:])):
            errors[i] = errors[i] or error
    if check and any(errors):
        raise RuntimeError("\n".join(f"job {jobs[i]}:\n{e}" for i, e in enumerate(errors) if e))
    return errors


def metrics(directory: Path) -> list[dict]:
    """The effective line of every step, in order."""
    rows: dict[int, dict] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["step"]] = row
    return [rows[s] for s in sorted(rows)]


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def _worker(jobs: list[list[str]], setup: str) -> None:
    if setup:
        exec(setup, {})
    import torch.distributed as dist

    from train import config, lifecycle, main

    # One group for all jobs: DeepSpeed remembers its own for the life of the process. Jobs without an engine need none.
    if int(os.environ["WORLD_SIZE"]) > 1 or not all("strategy=single" in job for job in jobs):
        dist.init_process_group("gloo")
    errors: list[str | None] = []
    for job in jobs:
        try:
            main.train(config.compose(job, plugin=os.environ.get("GEARSHIFT_PLUGIN")), lifecycle.Request())
            errors.append(None)
        except BaseException:
            errors.append(traceback.format_exc())
            lifecycle.fail("test")
            if "transformers.integrations.deepspeed" in sys.modules:  # else the next model is built partitioned
                from transformers.integrations.deepspeed import unset_hf_deepspeed_config

                unset_hf_deepspeed_config()
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState, GradientState, PartialState

            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
        for key in [k for k in os.environ if k.startswith("ACCELERATE_")]:
            del os.environ[key]
    print("JOBS " + json.dumps(errors), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]), sys.argv[2])
