"""When a run should stop early, and why; and when it has stopped by itself.

Owns: the signal handlers, the STOP and SAVE files, `run.stop_at` and `run.max_time`. A stop is only ever a request: it
becomes true when all ranks agree at a step boundary, because the wish travels with the all-reduce of the step's counts.
And the watchdog, which notices that nothing moves any more (`run.step_timeout_s`, `run.startup_timeout_s`).

Does not own: saving and leaving (`main.py`), or writing STOP on a signal to the launcher (`launch/local.py`).
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

from train import rundir
from train.config import Config, seconds

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_PRESS_S = 1.0
"""A Ctrl-C so long after the first one is meant as a second one."""


class Stop:
    """Requests to stop, from this process's point of view.

    Repeated SIGTERM and SIGUSR1 change nothing; a second SIGINT a second or more after the first leaves at once.
    """

    def __init__(self, cfg: Config, stop_file: Path, save_file: Path, *, started: float) -> None:
        """started: `time.monotonic()` from which `run.max_time` counts."""
        self.stop_file, self.save_file = stop_file, save_file
        self.stop_at = cfg.run.stop_at
        self.deadline = None if cfg.run.max_time is None else started + seconds(cfg.run.max_time)
        self.signalled: str | None = EARLY.get("reason")
        self.interrupted_at = EARLY.get("at")
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupted_at = _interrupted(self.interrupted_at)
        if self.signalled is None:
            self.signalled = signal.Signals(number).name

    def reason(self, step: int) -> str | None:
        """Why this rank wants to stop after `step`, or None."""
        if self.signalled is not None:
            return f"signal {self.signalled}"
        if self.stop_file.exists():
            text = self.stop_file.read_text(errors="replace").strip()
            return text.splitlines()[0][:200] if text else "STOP file"
        if self.stop_at is not None and step >= self.stop_at:
            return f"run.stop_at={self.stop_at}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "run.max_time"
        return None

    def save_wanted(self) -> bool:
        """A SAVE file asks for a checkpoint without stopping; once it was agreed on and served, `save_done` takes it away."""
        return self.save_file.exists()

    def save_done(self) -> None:
        self.save_file.unlink(missing_ok=True)


def _interrupted(first: float | None) -> float:
    """When Ctrl-C was pressed first, on the monotonic clock; the second press leaves at once."""
    now = time.monotonic()
    if first is not None and now - first >= SECOND_PRESS_S:
        os._exit(130)
    return now if first is None else first


EARLY: dict = {}


def catch_early() -> None:
    """From the first instant of the process, note a request to stop instead of dying half-imported.

    Under our launcher or an elastic agent, its death is such a request: killed, it can pass nothing on (Linux).
    """

    def note(number: int, frame: FrameType | None) -> None:
        EARLY.setdefault("reason", signal.Signals(number).name)
        if number == signal.SIGINT:
            EARLY["at"] = _interrupted(EARLY.get("at"))

    for number in SIGNALS:
        signal.signal(number, note)
    if sys.platform == "linux" and {"GEARSHIFT_ATTEMPT_TOKEN", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


PATIENCE_S = 10.0
"""What ranks get to say where they are, once one has found that nothing moves."""


class Watchdog:
    """Ends a run in which nothing moves any more, and says which rank the others wait for.

    Ranks wait for each other in every step, so where one hangs all fall silent. The first that has been silent for too
    long makes a directory in `logs/`; all look for it, write their stacks to their logs and where they are into it, and
    leave. The main process names the rank behind: the one that got least far, or does not answer.
    """

    def __init__(self, cfg: Config, rank: int, world_size: int, fail: Callable[[str], None]) -> None:
        """fail: writes down, on the main process, why the run failed."""
        self.rank, self.world_size, self._fail = rank, world_size, fail
        self._limit_s, self._step_limit_s = cfg.run.startup_timeout_s, cfg.run.step_timeout_s
        self._logs: IO[str] = sys.__stderr__ or sys.stderr
        self._meeting: Path | None = None
        self._marks, self._doing, self._since = 0, "start-up", time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def open(self, logs: Path, attempt: int) -> None:
        """From now on there is a place for stacks, and one for ranks to meet."""
        self._logs = open(logs / f"rank-{self.rank}.log", "a")  # noqa: SIM115 - for the life of the process
        self._meeting = logs / f"hung-{attempt}"
        self._since = time.monotonic()

    def mark(self, step: int, doing: str) -> None:
        """This rank moves: it begins to do something in `step`. Ranks make the same marks in the same order."""
        first = not self._marks
        self._marks += 1
        self._doing, self._limit_s, self._since = f"step {step}, {doing}", self._step_limit_s, time.monotonic()
        if first:
            self._arm()

    def through(self, items: Iterable[T], step: int, doing: str) -> Iterator[T]:
        """The same items, a mark at each: work that takes long is not work that hangs."""
        for item in items:
            self.mark(step, doing)
            yield item

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while True:
            self._arm()
            if self._closed.wait(min(2.0, self._limit_s / 5)):
                return faulthandler.cancel_dump_traceback_later()
            if time.monotonic() - self._since > self._limit_s or (self._meeting is not None and self._meeting.exists()):
                self._end()

    def _arm(self) -> None:
        """Where the watching thread cannot run either, because native code holds the interpreter, a timer in C can."""
        faulthandler.dump_traceback_later(self._limit_s + 2 * PATIENCE_S, exit=True, file=self._logs)

    def _end(self) -> None:
        limit_s = self._limit_s
        print(f"\nnothing moves: {self._doing}, limit {limit_s:.0f} s. Stacks:", file=self._logs, flush=True)
        faulthandler.dump_traceback(self._logs, all_threads=True)
        if self._meeting is None:
            if self.rank == 0:
                self._fail(f"hung for {limit_s:.0f} s in start-up")
            os._exit(1)
        rundir.make_directory(self._meeting)
        me = {"marks": self._marks, "waits": _in_collective(), "doing": self._doing}
        rundir.atomic_write(self._meeting / f"rank-{self.rank}.json", json.dumps(me))
        verdict, deadline = self._meeting / "verdict", time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not verdict.exists():
            time.sleep(0.1)
            places = {int(file.stem[5:]): json.loads(file.read_bytes()) for file in self._meeting.glob("rank-*.json")}
            if self.rank == 0 and len(places) == self.world_size:
                break
        if self.rank == 0:
            reason = f"hung for {limit_s:.0f} s: {behind(places, self.world_size)}; every rank's stacks are in its log"
            self._fail(reason)
            print(reason, file=sys.stderr, flush=True)
            rundir.atomic_write(verdict, reason)
        os._exit(1)


def behind(places: dict[int, dict[str, Any]], world_size: int) -> str:
    """Which ranks the others wait for, in words. places: rank -> marks passed, whether it waits for others, what it does."""
    if silent := sorted(set(range(world_size)) - places.keys()):
        return f"rank {', '.join(map(str, silent))} does not answer"
    far = {rank: (place["marks"], place["waits"]) for rank, place in places.items()}
    last = sorted(rank for rank in far if far[rank] == min(far.values()))
    if len(last) == world_size > 1:
        return f"all ranks got equally far ({places[0]['doing']})"
    return "; ".join(f"rank {rank} is behind ({places[rank]['doing']})" for rank in last)


def _in_collective() -> bool:
    """Whether the main thread waits inside of torch's communication."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    for _ in range(6):
        if frame is not None and f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame and frame.f_back
    return False
