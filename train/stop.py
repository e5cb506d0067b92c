"""When a run should stop early, and why.

Owns: the signal handlers, the STOP and SAVE files, `run.stop_at` and `run.max_time`. A stop is only ever a request: it
becomes true when all ranks agree at a step boundary, because `wanted` travels with the all-reduce of the step's counts.

Does not own: saving and leaving (`main.py`), or writing STOP on a signal to the launcher (`launch/local.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from train.config import Config, seconds

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
        self.interrupted_at = EARLY.get("at", 0.0)
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.interrupted_at and now - self.interrupted_at >= 1.0:
                os._exit(130)
            self.interrupted_at = self.interrupted_at or now
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
        """A SAVE file asks for a checkpoint without stopping; `save_done` takes it away."""
        return self.save_file.exists()

    def save_done(self) -> None:
        self.save_file.unlink(missing_ok=True)


EARLY: dict = {}


def catch_early() -> None:
    """From the first instant of the process, note a request to stop instead of dying half-imported.

    Under our launcher or an elastic agent, its death is such a request: killed, it can pass nothing on (Linux).
    """

    def note(number: int, frame: FrameType | None) -> None:
        EARLY.setdefault("reason", signal.Signals(number).name)
        EARLY.setdefault("at", time.monotonic())

    for number in SIGNALS:
        signal.signal(number, note)
    if sys.platform == "linux" and {"GEARSHIFT_ATTEMPT_TOKEN", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
