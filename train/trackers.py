"""Weights & Biases, MLflow and TensorBoard: views of a run's metrics, fed from the side.

Owns: every import of those libraries, the processes they live in, and the patience with them. The truth is
`metrics.jsonl`; a tracker that refuses, fails or hangs costs one warning, and the run goes on.

Does not own: what is measured (`metrics.py`).

A tracker runs in a process of its own, started with the first row. In a thread of the training process it would hold
Python's lock: importing and starting W&B stops the launching of steps for about two seconds, each logged row for half a
millisecond, and a hung one could not be ended. So the run puts rows into a bounded queue, one thread writes them down a
pipe as lines of JSON, one reads what comes back, and the process (`_serve`) does the rest:

    run -> it    the spec, then {"row": {...}} ..., then {"end": {...}}
    it -> run    {"done": n} messages handled, {"warning": "..."}
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from train.config import Config, to_dict
from train.describe import scrub
from train.rundir import FILE_MODE, RunDir, read_jsonl

log = logging.getLogger(__name__)

NAMES = {"wandb": "W&B", "mlflow": "MLflow", "tensorboard": "TensorBoard"}
QUEUED_ROWS = 8192
SILENCE_S = 10.0
"""At the end of a run, a tracker that has owed an answer for so long is taken for hung."""
LAST_CHANCE_S = 3.0
"""It has at least so long all the same: the run may have left it no core."""
ORPHAN_S = 20.0
"""A tracker whose run is gone has so long to finish."""
_NO_METRIC = ("attempt", "loss_hex")


# ------------------------------------------------------------------------------------------------------ in the run


class Trackers:
    """The trackers of a run; none on ranks that are not the main process."""

    def __init__(self, feeds: list[_Feed]) -> None:
        self._feeds = feeds

    def log(self, row: dict[str, Any]) -> None:
        """Hand on a row of `metrics.jsonl`. Takes microseconds, and never raises or waits."""
        for feed in self._feeds:
            feed.put({"row": row})

    def close(self, summary: dict[str, Any], timeout_s: float = 20.0) -> None:
        """Hand on the run's last words (its `status` among them) and wait for all trackers, `timeout_s` at most."""
        deadline = time.monotonic() + timeout_s
        for feed in self._feeds:
            feed.put({"end": summary})
        for feed in self._feeds:
            feed.close(deadline)


def open(cfg: Config, run: RunDir, attempt: int, hashes: dict[str, str], *, active: bool) -> Trackers:
    """The trackers that `cfg.tracker` names. Starts nothing yet.

    hashes: `math_hash` and `exec_hash`. active: on the main process; elsewhere there are no trackers.
    """
    wanted = [name for name in NAMES if active and getattr(cfg.tracker, name)]
    if not wanted:
        return Trackers([])

    spec = {
        "run": run.path.name,
        "id": _identity(run, attempt),
        "attempt": attempt,
        "directory": str(run.path),
        "project": cfg.tracker.project,
        "entity": cfg.tracker.entity,
        "mode": cfg.tracker.mode,
        "config": {**to_dict(cfg), **hashes},
        "pid": os.getpid(),
        "orphan_s": ORPHAN_S,
        "argv": [scrub(word) for word in sys.argv],
    }
    return Trackers([_Feed(name, {**spec, "tracker": name}, run.logs / f"{name}.log") for name in wanted])


def _identity(run: RunDir, attempt: int) -> str:
    """What trackers know the run by, for life. Names repeat from one run root to another, so chance is added, and kept
    in the events, which move with the run."""
    known = [event["id"] for event in read_jsonl(run.events) if event["kind"] == "tracked"]
    if not known:
        known.append(f"{run.path.name}-{secrets.token_hex(3)}")
        run.event("tracked", attempt=attempt, id=known[0])
    return known[0]


class _Feed:
    """One tracker as the run sees it."""

    def __init__(self, name: str, spec: dict[str, Any], log_file: Path) -> None:
        self.name, self.spec, self.log_file = name, spec, log_file
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(QUEUED_ROWS)
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._over = threading.Event()  # the process has ended, or never began
        self._warned = False
        self._given = self._done = 0
        self._sign = time.monotonic()  # since when an answer is owed, if one is

    def put(self, message: dict[str, Any]) -> None:
        if self._over.is_set():
            return
        if self._given == self._done:
            self._sign = time.monotonic()
        while True:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(message)
                self._given += 1
                break
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()  # the oldest makes room, never the end
                self._given -= 1
            self.warn("does not keep up and misses rows")
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name=f"to-{self.name}", daemon=True)
            self._thread.start()

    def close(self, deadline: float) -> None:
        """Wait until the process has ended; end it when it is late or hung."""
        if self._thread is None:
            return
        last_chance = time.monotonic() + LAST_CHANCE_S
        while time.monotonic() < min(deadline, max(self._sign + SILENCE_S, last_chance)):
            if self._over.wait(0.05):
                return
        self.warn(f"did not finish and was ended; it may lack the last {self._given - self._done} rows")
        if self._process is not None:
            self._process.kill()
            self._over.wait(5.0)

    def warn(self, text: str) -> None:
        """Once: whatever else goes wrong with this tracker follows from the same."""
        if not self._warned:
            self._warned = True
            log.warning("%s %s. metrics.jsonl has every step; details in %s", NAMES[self.name], text, self.log_file)

    def _write(self) -> None:
        """The thread that starts the process and writes to it. Blocks when the process does not read."""
        try:
            process = self._process = self._start()
        except OSError as error:
            self.warn(f"could not be started: {error}")
            return self._over.set()
        threading.Thread(target=self._read, args=(process,), name=f"from-{self.name}", daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has gone; the reader says why
            process.stdin.write(json.dumps(self.spec) + "\n")
            while not self._over.is_set():
                messages = _all_of(self._queue)
                process.stdin.write("".join(json.dumps(message) + "\n" for message in messages))
                process.stdin.flush()
                if "end" in messages[-1]:
                    break
            process.stdin.close()

    def _read(self, process: subprocess.Popen[str]) -> None:
        """The thread that reads the answers, until the process ends."""
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            self._sign = time.monotonic()
            self._done += answer.get("done", 0)
            if "warning" in answer:
                self.warn(answer["warning"])
        code = process.wait()
        if code:
            self.warn(f"ended with exit code {code}")
        self._over.set()

    def _start(self) -> subprocess.Popen[str]:
        # By module, from this very tree, without the current directory on the path: it may hold a folder `wandb`.
        path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log_file.touch(FILE_MODE)
        with self.log_file.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "train.trackers"],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run
            )


def _all_of(source: queue.Queue[Any]) -> list[Any]:
    """Wait for something, and take all that is there."""
    taken = [source.get()]
    with contextlib.suppress(queue.Empty):
        while True:
            taken.append(source.get_nowait())
    return taken


# ------------------------------------------------------------------------------------------ in the tracker's process


class _Tracker(Protocol):
    """`rows` of numbers have a `step`; `finish` gets the run's summary, or nothing if the run has died."""

    def log(self, rows: list[dict[str, float]]) -> None: ...

    def finish(self, summary: dict[str, Any]) -> None: ...


def _serve() -> None:
    """The life of one tracker. Ends with its input; a run that dies without a word closes it as well."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to the log file
    inbox: queue.Queue[dict[str, Any]] = queue.Queue(QUEUED_ROWS)
    messages = os.fdopen(os.dup(0))
    with contextlib.suppress(OSError), Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)  # nobody can be asked for a key
    os.nice(5)  # training goes first
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the scheduler sends them to all; the run decides when this ends

    def answer(**fields: Any) -> None:
        with contextlib.suppress(OSError):  # the run is gone
            print(json.dumps(fields), file=answers, flush=True)

    spec = json.loads(messages.readline())
    threading.Thread(target=_receive, args=(messages, inbox), daemon=True).start()
    threading.Thread(target=_watch, args=(spec["pid"], spec["orphan_s"]), daemon=True).start()
    make: dict[str, Callable[[dict[str, Any]], _Tracker]]
    make = {"wandb": _WandB, "mlflow": _MLflow, "tensorboard": _TensorBoard}
    try:
        importlib.import_module(spec["tracker"])
        answer()  # a sign of life after each long part
        tracker = make[spec["tracker"]](spec)
        answer()
    except Exception as error:
        answer(warning=f"refused to start: {_told(error)}")
        sys.exit(1)

    def tried(act: Callable[[Any], None], argument: Any) -> None:
        try:
            act(argument)
        except Exception as error:
            answer(warning=f"failed: {_told(error)}")

    ends: list[dict[str, Any]] = []
    while not ends:
        batch = _all_of(inbox)
        if rows := [_numbers(message["row"]) for message in batch if "row" in message]:
            tried(tracker.log, rows)
        if ends := [message["end"] for message in batch if "end" in message]:
            tried(tracker.finish, ends[0])
        answer(done=len(batch))


def _receive(messages: Iterable[str], inbox: queue.Queue[dict[str, Any]]) -> None:
    for line in messages:
        inbox.put(json.loads(line))
    inbox.put({"end": {}})  # of a run that died; after another end, nobody looks at this one


def _watch(run: int, patience_s: float) -> None:
    """No tracker outlives its run, the process `run`, for long, hung or not."""
    while os.getppid() == run:
        time.sleep(1.0)
    time.sleep(patience_s)
    os._exit(1)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float) and key not in _NO_METRIC}


def _told(error: Exception) -> str:
    """Write the traceback to the log file; returns the error's first line."""
    print(scrub("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return scrub(lines[0])[:200].rstrip(".")


class _WandB:
    """One W&B run for each attempt offline (two with one id cannot be merged), one for life online."""

    def __init__(self, spec: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        offline = spec["mode"] == "offline"
        sys.argv = spec["argv"]
        self._run = wandb.init(
            project=spec["project"],
            entity=spec["entity"],
            dir=spec["directory"],
            id=f"{spec['id']}-a{spec['attempt']}" if offline else spec["id"],
            name=f"{spec['run']}-a{spec['attempt']}" if offline else spec["run"],
            group=spec["run"],
            resume=None if offline else "allow",
            mode=spec["mode"],
            config=spec["config"],
            settings=wandb.Settings(
                silent=True,
                console="off",
                symlink=False,
                program=spec["argv"][0],
                init_timeout=60,
                finish_timeout=SILENCE_S - 2,
                x_stats_pid=spec["pid"],
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            self._run.log(row)

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=0 if summary.get("status") in ("finished", "stopped") else 1)


class _MLflow:
    """One MLflow run for life, in `mlruns` of the run root or at MLFLOW_TRACKING_URI."""

    def __init__(self, spec: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        import mlflow
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (Path(spec["directory"]).parent / "mlruns").as_uri()
        self._client = client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(spec["project"])
        where = experiment.experiment_id if experiment else client.create_experiment(spec["project"])
        found = client.search_runs([where], f"tags.gearshift_id = '{spec['id']}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(where, run_name=spec["run"], tags={"gearshift_id": spec["id"]}).info.run_id
            params = [Param(key, value[:500]) for key, value in _flat(spec["config"])]
            for at in range(0, len(params), 100):  # the most that a server takes at once
                client.log_batch(self._id, params=params[at : at + 100])
        for key in ("attempt", "directory"):
            client.set_tag(self._id, key, spec[key])
        for key in ("math_hash", "exec_hash"):
            client.set_tag(self._id, key, spec["config"][key])

    def log(self, rows: list[dict[str, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, int(row["step"])) for row in rows for key, value in row.items()]
        for at in range(0, len(metrics), 1000):  # a server takes no more at once
            self._client.log_batch(self._id, metrics=metrics[at : at + 1000])

    def finish(self, summary: dict[str, Any]) -> None:
        for key, value in summary.items():
            self._client.set_tag(self._id, key, value)
        ends = {"finished": "FINISHED", "stopped": "KILLED"}
        self._client.set_terminated(self._id, ends.get(summary.get("status", ""), "FAILED"))


class _TensorBoard:
    """Event files in `tensorboard/` of the run directory. By TensorBoard's own writer: torch's would import torch."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(Path(spec["directory"]) / "tensorboard"), flush_secs=10)
        self._begun = False

    def log(self, rows: list[dict[str, float]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            step = int(row["step"])
            if not self._begun:  # what an earlier attempt logged from this step on is void
                start = SessionLog(status=SessionLog.START)
                self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
                self._begun = True
            values = [Summary.Value(tag=key, simple_value=value) for key, value in row.items() if key != "step"]
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def finish(self, summary: dict[str, Any]) -> None:
        self._writer.close()


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`optim.lr`, `0.001`"""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


if __name__ == "__main__":
    _serve()
