"""What a run measures about itself, step by step, and what a person sees of it while it runs.

Owns: `metrics.jsonl` (the truth about every step; any tracker is a view of it), the console line, the log file of each
rank, and the peaks of well-known cards that MFU is measured against.

Does not own: what is evaluated (tasks), where rows go besides the file (`trackers.py`), how a file grows (`rundir.py`).

A step costs two small copies on the device and no communication. Every `log.every` steps the values of all those steps
take one all-reduce, one copy to the host and one write. Imports torch only where a tensor is made: reports read, too.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import statistics
import sys
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import Config
from train.describe import scrub
from train.rundir import FILE_MODE, RunDir, append_lines, make_directory, read_jsonl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from train.strategy import Processes

Row = dict[str, Any]

PLAIN_EVERY_S = 5.0
"""Without a terminal: seconds between two lines."""

# ----------------------------------------------------------------------------------------------------------- the peaks

PEAK_FLOPS: dict[str, dict[str, float]] = {
    # "Tensor Core GPU" data sheets of H200, H100, A100, A30, A40, A10, L4, L40, L40S, T4, V100. Where a sheet gives
    # tensor figures "with sparsity" only, half of them stands here.
    "b200": {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1125e12, "fp32": 75e12},
    "gh200": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "h200": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "h200 nvl": {"bf16": 835.5e12, "fp16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "h100": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},  # SXM5: names itself "80GB HBM3"
    "h100 nvl": {"bf16": 835.5e12, "fp16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    "h100 pcie": {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51.2e12},
    "h800": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "a100": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "a800": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "a30": {"bf16": 165e12, "fp16": 165e12, "tf32": 82e12, "fp32": 10.3e12},
    "a40": {"bf16": 149.7e12, "fp16": 149.7e12, "tf32": 74.8e12, "fp32": 37.4e12},
    "a10": {"bf16": 125e12, "fp16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12},
    "a10g": {"bf16": 70e12, "fp16": 70e12, "tf32": 35e12, "fp32": 35e12},
    "l4": {"bf16": 121e12, "fp16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    "l40": {"bf16": 181e12, "fp16": 181e12, "tf32": 90.5e12, "fp32": 90.5e12},
    "l40s": {"bf16": 362e12, "fp16": 362e12, "tf32": 183e12, "fp32": 91.6e12},
    "t4": {"fp16": 65e12, "fp32": 8.1e12},
    "v100 sxm2": {"fp16": 125e12, "fp32": 15.7e12},
    "v100 pcie": {"fp16": 112e12, "fp32": 14e12},
    # RTX: architecture white papers (GA102 2.0, Ada 2.1, RTX Blackwell 1.1), tensor figures with fp32 accumulation,
    # which is what training uses and what GeForce cards run at half rate.
    "rtx a6000": {"bf16": 154.8e12, "fp16": 154.8e12, "tf32": 77.4e12, "fp32": 38.7e12},
    "rtx 6000 ada": {"bf16": 364.2e12, "fp16": 364.2e12, "tf32": 182.1e12, "fp32": 91.1e12},
    "rtx 5090": {"bf16": 209.5e12, "fp16": 209.5e12, "tf32": 104.8e12, "fp32": 104.8e12},
    "rtx 5080": {"bf16": 112.6e12, "fp16": 112.6e12, "tf32": 56.3e12, "fp32": 56.3e12},
    "rtx 5070 ti": {"bf16": 87.9e12, "fp16": 87.9e12, "tf32": 43.9e12, "fp32": 43.9e12},
    "rtx 5070": {"bf16": 61.7e12, "fp16": 61.7e12, "tf32": 30.9e12, "fp32": 30.9e12},
    "rtx 4090": {"bf16": 165.2e12, "fp16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
    "rtx 4080": {"bf16": 97.5e12, "fp16": 97.5e12, "tf32": 48.7e12, "fp32": 48.7e12},
    "rtx 3090": {"bf16": 71e12, "fp16": 71e12, "tf32": 35.6e12, "fp32": 35.6e12},
    "rtx 3080": {"bf16": 59.5e12, "fp16": 59.5e12, "tf32": 29.8e12, "fp32": 29.8e12},
    "rtx 3070": {"bf16": 40.6e12, "fp16": 40.6e12, "tf32": 20.3e12, "fp32": 20.3e12},
}
"""Dense peak of one card in FLOP/s, by name and precision."""

_OTHER_CHIP = {"d", "grid", "laptop", "max", "mig", "mobile", "super", "ti"}
"""Words that make another chip, or a part of one, of a name, unless the table has them in the name too."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a card can reach in `fp32`, `tf32`, `bf16` or `fp16`; `None` where the table does not know it.

    device_name: as the driver names it ("NVIDIA A100-SXM4-80GB"), or as people do ("rtx4090").
    """
    words = set(re.findall(r"[a-z0-9]+", re.sub(r"rtx(?=\d)", "rtx ", device_name.lower())))
    names = [name for name in PEAK_FLOPS if words.issuperset(name.split())]
    if not names:
        return None
    best = max(names, key=lambda name: len(name.split()))
    return None if words & _OTHER_CHIP - set(best.split()) else PEAK_FLOPS[best].get(precision)


def lm_flops(trained: int, total: int, tokens: int) -> float:
    """FLOPs of a language model's step: per token, 4 for each parameter (forward, and gradients of activations) and 2
    for each that is trained: 6 N in all. Attention's own products are left out."""
    return float(4 * total + 2 * trained) * tokens


# ----------------------------------------------------------------------------------------------------------- the meter


class Meter:
    """Measures of every step, kept on the device until `flush`. All ranks make the same calls."""

    def __init__(self, cfg: Config, run: RunDir, procs: Processes, *, attempt: int, total_steps: int,
                 flops_per_step: float | None = None) -> None:  # fmt: skip
        """flops_per_step: of the model, for a whole global batch. Without it, or on an unknown card, `mfu` is null."""
        import torch

        self.procs, self.attempt, self.path = procs, attempt, run.metrics
        self.samples_per_step = cfg.train.global_batch_size
        self.tokens_per_sample = cfg.data.seq_len if cfg.task.name == "causal_lm" else None
        peak, limit_gib = None, None
        if procs.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(procs.device), _matmul_precision(cfg.train.precision))
            limit_gib = torch.cuda.get_device_properties(procs.device).total_memory / 2**30
            limit_gib = min(limit_gib, cfg.hardware.memory_gib or limit_gib)
        # Seconds that a step would take at the peak of all devices together.
        self._ideal_s = flops_per_step / (peak * procs.world_size) if flops_per_step and peak else None
        self.console = Console(total_steps, limit_gib) if procs.is_main else None

        # Sums over ranks: the loss of each step, then one slot per rank for its memory, so that one all-reduce of a sum
        # gives the largest too. MPS has no fp64.
        dtype = torch.float32 if procs.device.type == "mps" else torch.float64
        self._sums = torch.zeros(cfg.log.every + procs.world_size, dtype=dtype, device=procs.device)
        self._norms = torch.zeros(cfg.log.every, dtype=dtype, device=procs.device)
        self._loss_slots, self._norm_slots = self._sums[: cfg.log.every].unbind(), self._norms.unbind()
        self._pending: list[Row] = []
        self._evals: dict[int, dict[str, float]] = {}
        self._step_s = array("d")
        self._peak_gib = 0.0

    def record(self, step: int, loss: Tensor, grad_norm: Tensor | None, lr: float, *, samples: int,
               step_s: float, data_wait_s: float) -> None:  # fmt: skip
        """Note one step. Nothing is read from the device, and no other rank is asked.

        loss: this rank's share of the step's mean loss, a scalar on the device; the shares of all ranks add up to it.
        grad_norm: over all ranks, or `None` for a step that was skipped. samples: that went into the step, over all
        ranks. step_s, data_wait_s: seconds by the host's clock.
        """
        slot = len(self._pending)
        if slot == len(self._loss_slots):
            raise RuntimeError(f"{slot} steps recorded without a flush; log.every={slot}")
        self._loss_slots[slot].copy_(loss.detach())
        if grad_norm is not None:
            self._norm_slots[slot].copy_(grad_norm.detach())
        self._pending.append({
            "step": step, "attempt": self.attempt, "loss": None, "loss_hex": None, "lr": lr,
            "grad_norm": None if grad_norm is None else math.nan, "step_s": step_s, "samples_per_s": samples,
            "tokens_per_s": None, "mfu": None, "memory_gib": None, "data_wait_s": data_wait_s,
        })  # fmt: skip

    def add_eval(self, step: int, values: dict[str, float]) -> None:
        """Give a step that is recorded and not yet flushed the metrics of its evaluation, named `eval_...`."""
        if all(row["step"] != step for row in self._pending):
            raise ValueError(f"step {step} is not waiting for a flush: evaluate before it")
        self._evals[step] = values

    def flush(self) -> list[Row]:
        """Fetch, complete, write and show the recorded steps; returns their rows. Collective, and the only wait."""
        steps = len(self._pending)
        if not steps:
            return []
        began = time.perf_counter()
        self._sums[len(self._loss_slots) + self.procs.rank] = memory_gib(self.procs.device)
        self.procs.sum(self._sums)
        sums, norms = self._sums.tolist(), self._norms.tolist()
        self._sums.zero_()
        # Where the host runs ahead of the device, its clock has seen the launching of the work and not the work: what
        # it now had to wait for belongs to these steps.
        behind_s = (time.perf_counter() - began) / steps
        self._peak_gib = max(self._peak_gib, *sums[len(self._loss_slots) :])

        rows, self._pending = self._pending, []
        for row, loss, norm in zip(rows, sums, norms):
            step_s = row["step_s"] + behind_s
            samples_per_s = row["samples_per_s"] / step_s
            row.update(
                loss=loss,
                loss_hex=loss.hex(),
                grad_norm=None if row["grad_norm"] is None else norm,
                step_s=_digits(step_s),
                samples_per_s=_digits(samples_per_s),
                tokens_per_s=_digits(samples_per_s * self.tokens_per_sample) if self.tokens_per_sample else None,
                mfu=_digits(self._ideal_s / step_s) if self._ideal_s else None,
                memory_gib=_digits(self._peak_gib),
                data_wait_s=_digits(row["data_wait_s"]),
                **self._evals.pop(row["step"], {}),
            )
            self._step_s.append(step_s)
        if self.console is not None:
            append_lines(self.path, rows)
            self.console.show(rows)
        return rows

    def summary(self) -> dict[str, float | None]:
        """`measured` of `result.json`, for this attempt: the median step, without the first, which warms up.

        `peak_memory_gib` is the largest of all ranks, of what `memory_gib` measures. Ends the live line.
        """
        if self.console is not None:
            self.console.close()
        if not self._step_s:
            return {"peak_memory_gib": None, "step_s": None, "tokens_per_s": None}
        step_s = statistics.median(self._step_s[1:] or self._step_s)
        tokens = self.samples_per_step * self.tokens_per_sample if self.tokens_per_sample else None
        return {
            "peak_memory_gib": _digits(self._peak_gib),
            "step_s": _digits(step_s),
            "tokens_per_s": None if tokens is None else _digits(tokens / step_s),
        }


def memory_gib(device: torch.device) -> float:
    """The most memory held so far, in GiB: by tensors on a CUDA device, by the whole process elsewhere (resident)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: its figure is inherited from the process that started this one
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def read(path: Path) -> dict[int, Row]:
    """Rows of a `metrics.jsonl` by step, in order. Of several attempts at a step, the highest is the truth."""
    rows: dict[int, Row] = {}
    for row in read_jsonl(path):
        if row["step"] not in rows or row["attempt"] >= rows[row["step"]]["attempt"]:
            rows[row["step"]] = row
    return dict(sorted(rows.items()))


def _matmul_precision(precision: str) -> str:
    import torch

    return "tf32" if precision == "fp32" and torch.get_float32_matmul_precision() != "highest" else precision


def _digits(value: float) -> float:
    """Six significant digits: what a clock is good for."""
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------------------------------------- the console


class Console:
    """Progress, on stderr: one live line on a terminal, a line every few seconds elsewhere. Main process only."""

    def __init__(self, total_steps: int, memory_limit_gib: float | None) -> None:
        self.total_steps, self.memory_limit_gib = total_steps, memory_limit_gib
        self._live: Any = None
        self._first: tuple[int, float] | None = None  # (step, time) of the first row: the first step is no measure
        self._shown_at = -PLAIN_EVERY_S
        self._held: str | None = None
        self._terminal = sys.stderr.isatty()

    def show(self, rows: list[Row]) -> None:
        """Show the newest of `rows`; speeds are means over all of them."""
        now, row = time.monotonic(), rows[-1]
        evaluated = [r for r in rows if any(key.startswith("eval_") for key in r)]
        line = self.line(rows, now)
        if self._terminal:
            self._update(line)
            return
        if evaluated or row["step"] == self.total_steps or now - self._shown_at >= PLAIN_EVERY_S:
            print(line, file=sys.stderr, flush=True)
            self._shown_at, self._held = now, None
        else:
            self._held = line

    def line(self, rows: list[Row], now: float) -> str:
        """`step 120/5000 | loss 3.412 | lr 3.0e-04 | grad 0.81 | 41.2k tok/s | 38 % MFU | 6.9/8.0 GiB | eta 2.1 h`"""
        row, seconds = rows[-1], sum(r["step_s"] for r in rows)
        unit = "tok/s" if row["tokens_per_s"] is not None else "samples/s"
        speeds = [r["tokens_per_s"] or r["samples_per_s"] for r in rows]
        speed = sum(value * r["step_s"] for value, r in zip(speeds, rows)) / seconds
        norm = "skipped" if row["grad_norm"] is None else f"grad {row['grad_norm']:.2f}"
        parts = [f"step {row['step']}/{self.total_steps}", f"loss {row['loss']:.3f}", f"lr {row['lr']:.1e}", norm,
                 f"{_short(speed)} {unit}"]  # fmt: skip
        if row["mfu"] is not None:
            parts.append(f"{100 * sum(r['mfu'] * r['step_s'] for r in rows) / seconds:.0f} % MFU")
        limit = "" if self.memory_limit_gib is None else f"/{self.memory_limit_gib:.1f}"
        parts.append(f"{row['memory_gib']:.1f}{limit} GiB")
        parts.append("eta " + _duration(self._eta_s(row["step"], seconds / len(rows), now)))
        parts += [f"{key} {value:.4f}" for r in rows for key, value in r.items() if key.startswith("eval_")]
        return " | ".join(parts)

    def close(self) -> None:
        """Leave the last line behind, and the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._held is not None:
            print(self._held, file=sys.stderr, flush=True)
        self._held = None

    def _eta_s(self, step: int, step_s: float, now: float) -> float:
        """From the clock on the wall since the first row, so that evaluations and saves count as well."""
        self._first = self._first or (step, now)
        first_step, first_time = self._first
        pace = (now - first_time) / (step - first_step) if step > first_step else step_s
        return pace * (self.total_steps - step)

    def _update(self, line: str) -> None:
        global _open
        from rich.text import Text

        text = Text(line, no_wrap=True, overflow="ellipsis")
        if self._live is None:
            from rich.console import Console as Terminal
            from rich.live import Live

            # What is printed meanwhile appears above the line; but a stdout that goes to a file stays there.
            self._live = Live(text, console=Terminal(file=sys.stderr), auto_refresh=False,
                              redirect_stdout=sys.stdout.isatty())  # fmt: skip
            self._live.start()
            self._live.console.show_cursor(True)  # a process that is killed must not leave a terminal without one
            _open = self
        self._live.update(text, refresh=True)


_open: Console | None = None
"""The console that has a live line; a process has one."""


def close_console() -> None:
    """End the live line, if there is one, before something else is told: a failure."""
    if _open is not None:
        _open.close()


def _short(value: float) -> str:
    """`41.2k`"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    """`12 min`"""
    for size, unit in ((86400, "d"), (3600, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


# --------------------------------------------------------------------------------------------------------- the logs


def start_logging(run: RunDir, rank: int) -> None:
    """Send this process's log to `logs/rank-N.log`, with the warnings of libraries; rank 0's to stderr as well."""
    root, file = logging.getLogger(), make_directory(run.logs) / f"rank-{rank}.log"
    file.touch(FILE_MODE)
    to_file: logging.Handler = logging.FileHandler(file)
    to_file.setFormatter(_Scrubbed("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_stderr = _Stderr()
    to_stderr.setFormatter(_Scrubbed())
    while _handlers:  # of an earlier run in this process
        root.removeHandler(_handlers[-1])
        _handlers.pop().close()
    _handlers.extend([to_file, to_stderr] if rank == 0 else [to_file])
    for handler in _handlers:
        root.addHandler(handler)
    logging.getLogger("train").setLevel(logging.INFO)
    logging.captureWarnings(True)


_handlers: list[logging.Handler] = []


class _Scrubbed(logging.Formatter):
    """Lines and tracebacks without secrets: libraries put URLs and tokens into theirs."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


class _Stderr(logging.Handler):
    """Prints to whatever `sys.stderr` is at the time: while there is a live line, that puts the text above it."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"{level}{self.format(record)}", file=sys.stderr, flush=True)
