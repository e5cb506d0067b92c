"""The meter, the console line, the logs, the table of peaks."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train import metrics
from train.config import Config
from train.metrics import Console, Meter, peak_flops
from train.rundir import RunDir
from train.strategy import Processes

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["step", "attempt", "loss", "loss_hex", "lr", "grad_norm", "step_s", "samples_per_s", "tokens_per_s", "mfu",
        "memory_gib", "data_wait_s"]  # fmt: skip


def processes(device: str = "cpu") -> Processes:
    return Processes(0, 0, 1, torch.device(device))


def config(every: int = 4, **changes: object) -> Config:
    cfg = Config()
    cfg.log.every = every
    cfg.train.global_batch_size, cfg.data.seq_len, cfg.train.precision = 8, 16, "fp32"
    for key, value in changes.items():
        group, field = key.split("__")
        setattr(getattr(cfg, group), field, value)
    return cfg


def record(meter: Meter, step: int, loss: float = 2.5, norm: float | None = 0.5, device: str = "cpu") -> None:
    meter.record(step, torch.tensor(loss, device=device), None if norm is None else torch.tensor(norm, device=device),
                 1e-3, samples=8, step_s=0.25, data_wait_s=0.01)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


# ----------------------------------------------------------------------------------------------------------- the rows


def test_a_row_has_the_keys_of_the_contract(run: RunDir) -> None:
    meter = Meter(config(), run, processes(), attempt=3, total_steps=10)
    loss = 1 / 3
    record(meter, 1, loss)
    record(meter, 2, norm=None)
    meter.add_eval(2, {"eval_loss": 2.25})
    rows = meter.flush()
    written = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert rows == written
    assert list(written[0]) == KEYS
    assert list(written[1]) == [*KEYS, "eval_loss"]
    first, second = written
    assert first["loss"] == torch.tensor(loss).item()  # fp32 exactly, through fp64
    assert float.fromhex(first["loss_hex"]) == first["loss"]
    assert (first["step"], first["attempt"], first["lr"], first["grad_norm"]) == (1, 3, 1e-3, 0.5)
    assert second["grad_norm"] is None  # was skipped
    assert second["eval_loss"] == 2.25
    assert first["mfu"] is None  # a CPU has no known peak
    assert first["samples_per_s"] == pytest.approx(8 / first["step_s"], rel=1e-4)
    assert first["tokens_per_s"] == pytest.approx(16 * 8 / first["step_s"], rel=1e-4)
    assert 0.25 <= first["step_s"] < 0.35
    assert 0.05 < first["memory_gib"] < 64
    assert first["data_wait_s"] == 0.01


def test_only_language_models_count_tokens(run: RunDir) -> None:
    meter = Meter(config(task__name="classify"), run, processes(), attempt=1, total_steps=10)
    record(meter, 1)
    assert meter.flush()[0]["tokens_per_s"] is None
    assert meter.summary()["tokens_per_s"] is None


def test_what_is_not_finite_is_null_in_the_file_and_named_in_hex(run: RunDir) -> None:
    meter = Meter(config(), run, processes(), attempt=1, total_steps=10)
    record(meter, 1, float("inf"), float("nan"))
    meter.flush()
    line = run.metrics.read_text()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (row["loss"], row["loss_hex"], row["grad_norm"]) == (None, "inf", None)


def test_every_step_gets_a_line_whatever_the_cadence(run: RunDir) -> None:
    meter = Meter(config(every=4), run, processes(), attempt=1, total_steps=10)
    for step in range(1, 11):
        record(meter, step, loss=float(step))
        if step % 4 == 0:
            assert len(meter.flush()) == 4
    assert len(meter.flush()) == 2
    assert meter.flush() == []
    assert [(row["step"], row["loss"]) for row in metrics.read(run.metrics).values()] == [(s, s) for s in range(1, 11)]


def test_misuse_is_an_error(run: RunDir) -> None:
    meter = Meter(config(every=2), run, processes(), attempt=1, total_steps=10)
    record(meter, 1)
    record(meter, 2)
    with pytest.raises(RuntimeError, match=r"log\.every=2"):
        record(meter, 3)
    meter.flush()
    with pytest.raises(ValueError, match="step 2"):
        meter.add_eval(2, {"eval_loss": 1.0})


RANKS = """
import json, sys
import torch, torch.distributed as dist
from train import metrics
from train.config import Config
from train.metrics import Meter
from train.rundir import RunDir
from train.strategy import Processes

rank, directory, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 3), rank=rank, world_size=3)
calls, all_reduce = [], dist.all_reduce
dist.all_reduce = lambda tensor: (calls.append(tensor.numel()), all_reduce(tensor))
metrics.memory_gib = lambda device: [6.0, 7.0, 5.0][rank]
cfg = Config()
cfg.log.every, cfg.train.global_batch_size = 4, 8
meter = Meter(cfg, RunDir(directory), Processes(rank, rank, 3, torch.device("cpu")), attempt=1, total_steps=4)
shares = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
for step in range(1, 4):
    meter.record(step, shares[rank, step - 1], torch.tensor(float(rank)), 1e-3, samples=8, step_s=0.1, data_wait_s=0.0)
whole = shares[0, 0] if rank == 0 else torch.zeros(())  # exact numerics: one rank has it all
meter.record(4, whole, None, 1e-3, samples=8, step_s=0.1, data_wait_s=0.0)
assert not calls
losses = [row["loss"] for row in meter.flush()]
print(json.dumps({"losses": losses, "calls": len(calls), "summary": meter.summary(), "shares": shares.tolist()}))
dist.destroy_process_group()
"""


@pytest.mark.ranks
def test_three_ranks_agree_in_one_all_reduce_and_one_of_them_speaks(run: RunDir, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(run.path), str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), *arguments], cwd=ROOT, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0], told
    found = [json.loads(out) for out, _ in told]
    shares = found[0]["shares"]
    for answer in found:
        assert answer["calls"] == 1
        assert answer["losses"][:3] == [pytest.approx(sum(shares[r][s] for r in range(3)), rel=1e-15) for s in range(3)]
        assert answer["losses"] == found[0]["losses"]
        assert answer["losses"][3].hex() == shares[0][0].hex()
        assert answer["summary"]["peak_memory_gib"] == 7.0
    rows = list(metrics.read(run.metrics).values())
    assert len(run.metrics.read_text().splitlines()) == len(rows) == 4
    assert rows[0]["grad_norm"] == 0.0  # the main process's own: a norm is over all ranks already
    assert [bool(err) for _, err in told] == [True, False, False]


class Reads(TorchDispatchMode):
    """Counts the operations that bring a value to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_recording_reads_nothing_from_the_device(run: RunDir) -> None:
    cfg, loss = config(), torch.tensor(1.0)
    meter = Meter(cfg, run, processes(), attempt=1, total_steps=10)
    with Reads() as reads:
        for step in range(1, 5):
            meter.record(step, loss, loss, 1e-3, samples=8, step_s=0.1, data_wait_s=0.0)
    assert reads.count == 0
    with Reads() as reads:  # the control: this is what the counter would have seen
        loss.item()
    assert reads.count == 1

    # A tensor on the meta device has no values: to read one, or to copy it elsewhere, raises.
    meter = Meter(cfg, run, processes("meta"), attempt=1, total_steps=10)
    for step in range(1, 5):
        record(meter, step, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.flush()


def test_the_device_running_behind_is_counted(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    procs = processes()
    meter = Meter(config(), run, procs, attempt=1, total_steps=10)
    for step in range(1, 5):
        record(meter, step)
    clock = iter([100.0, 102.0])  # the flush waited for two seconds
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    assert [row["step_s"] for row in meter.flush()] == [0.75] * 4


def test_the_summary_leaves_out_the_first_step(run: RunDir) -> None:
    meter = Meter(config(), run, processes(), attempt=1, total_steps=10)
    for step, seconds in ((1, 30.0), (2, 0.5), (3, 0.5), (4, 0.6)):
        meter.record(step, torch.tensor(1.0), None, 1e-3, samples=8, step_s=seconds, data_wait_s=0.0)
    assert set(meter.summary().values()) == {None}  # nothing is measured yet
    meter.flush()
    summary = meter.summary()
    assert set(summary) == {"peak_memory_gib", "step_s", "tokens_per_s"}
    assert summary["step_s"] == pytest.approx(0.5, abs=0.05)
    assert summary["tokens_per_s"] == pytest.approx(8 * 16 / summary["step_s"], rel=1e-4)


def test_peak_memory_is_of_this_process(run: RunDir) -> None:
    code = "import types; from train.metrics import memory_gib; print(memory_gib(types.SimpleNamespace(type='cpu')))"
    block = bytearray(1 << 30)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])  # a parent of more than a GiB must not show in its child
    here = metrics.memory_gib(torch.device("cpu"))
    child = float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
    assert here > 1.0 > child > 0.005


# -------------------------------------------------------------------------------------------------------- reading


def test_the_highest_attempt_is_the_truth_and_a_torn_end_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "attempt": a, "loss": loss} for s, a, loss in
             [(1, 1, 9.0), (2, 1, 8.0), (3, 1, 7.0), (2, 2, 8.5), (4, 2, 6.0)]]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "atte')
    assert {step: row["loss"] for step, row in metrics.read(file).items()} == {1: 9.0, 2: 8.5, 3: 7.0, 4: 6.0}
    assert metrics.read(tmp_path / "none.jsonl") == {}


def test_reading_needs_no_torch() -> None:
    code = "import sys, train.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.call([sys.executable, "-c", code], cwd=ROOT) == 0


# ------------------------------------------------------------------------------------------------------- the peaks


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
        ("rtx3070", "bf16", 40.6),
        ("a100-80gb", "tf32", 156),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla T4", "fp16", 65),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        # What is not known has no MFU, rather than a wrong one.
        ("Tesla T4", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3080 Ti", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16", None),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_peaks_by_the_names_that_drivers_give(device: str, precision: str, tera: float | None) -> None:
    assert peak_flops(device, precision) == (None if tera is None else pytest.approx(tera * 1e12))


def test_tensor_peaks_are_dense_and_in_order() -> None:
    for name, peaks in metrics.PEAK_FLOPS.items():
        assert peaks["fp16"] == peaks.get("bf16", peaks["fp16"]), name
        assert peaks["fp32"] <= peaks.get("tf32", peaks["fp32"]) <= peaks["fp16"], name
        if name.startswith("rtx ") and name.split()[1].isdigit() and "ada" not in name:
            assert peaks["fp16"] / peaks["fp32"] == pytest.approx(2, rel=0.01), name  # GeForce: fp32 accumulation


def test_mfu_is_of_all_devices_together(run: RunDir) -> None:
    assert metrics.lm_flops(10, 10, 5) == 6 * 10 * 5
    assert metrics.lm_flops(0, 10, 5) == 4 * 10 * 5
    meter = Meter(config(), run, processes(), attempt=1, total_steps=10, flops_per_step=1e12)
    record(meter, 1)
    assert meter.flush()[0]["mfu"] is None
    meter._ideal_s = 0.1  # as on cards whose peak is known
    record(meter, 2)
    row = meter.flush()[0]
    assert row["mfu"] == pytest.approx(0.1 / row["step_s"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------ the console


def row(step: int, **changes: object) -> dict:
    return {"step": step, "attempt": 1, "loss": 3.412, "loss_hex": "", "lr": 3e-4, "grad_norm": 0.81, "step_s": 2.0,
            "samples_per_s": 80.0, "tokens_per_s": 41_200.0, "mfu": 0.38, "memory_gib": 6.9, "data_wait_s": 0.0,
            **changes}  # fmt: skip


def test_the_line() -> None:
    console = Console(5000, 8.0)
    assert console.line([row(120)], 0.0) == (
        "step 120/5000 | loss 3.412 | lr 3.0e-04 | grad 0.81 | 41.2k tok/s | 38 % MFU | 6.9/8.0 GiB | eta 2.7 h"
    )
    # From the second line on the clock on the wall counts: 10 steps in 40 s, evaluations included.
    assert console.line([row(130, mfu=None)], 40.0).endswith("| 41.2k tok/s | 6.9/8.0 GiB | eta 5.4 h")
    bare = row(4999, tokens_per_s=None, mfu=None, grad_norm=None, samples_per_s=8.25, eval_loss=3.25)
    assert Console(5000, None).line([bare], 0.0) == (
        "step 4999/5000 | loss 3.412 | lr 3.0e-04 | skipped | 8.2 samples/s | 6.9 GiB | eta 2 s | eval_loss 3.2500"
    )
    uneven = [row(1, step_s=1.0, tokens_per_s=300.0), row(2, step_s=3.0, tokens_per_s=100.0)]
    assert "150 tok/s" in Console(10, None).line(uneven, 0.0)  # 600 tokens in 4 s


def test_without_a_terminal_a_plain_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    console = Console(1000, None)
    for step in range(1, 101):
        console.show([row(step, **({"eval_loss": 1.0} if step == 33 else {}))])
        now[0] += 0.25
    console.close()
    console.close()
    out, err = capsys.readouterr()
    assert out == ""  # progress is no output
    assert [int(s) for s in re.findall(r"^step (\d+)/1000", err, re.M)] == [1, 21, 33, 53, 73, 93, 100]


TERMINAL = """
import sys, time
from train import metrics
console = metrics.Console(3, None)
row = {row}
for step in (1, 2, 3):
    console.show([dict(row, step=step)])
    print(f"printed {{step}}")
metrics.close_console()
print("after")
"""


def test_on_a_terminal_one_live_line_that_prints_do_not_tear() -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    code = TERMINAL.format(row=repr(row(1)))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    assert process.wait() == 0
    text = seen.decode()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    screen: list[str] = [""]
    for piece in re.split(r"(\r\n|\n|\r|\x1b\[[0-9;?]*[A-Za-z])", text):
        if piece in ("\r\n", "\n"):
            screen.append("")
        elif piece == "\x1b[2K":
            screen[-1] = ""
        elif not piece.startswith(("\x1b", "\r")):
            screen[-1] += piece
    lines = [line.rstrip() for line in screen if line.strip()]
    assert lines[:3] == ["printed 1", "printed 2", "printed 3"]
    assert lines[3].startswith("step 3/3 | loss 3.412")
    assert lines[4:] == ["after"]


# ---------------------------------------------------------------------------------------------------------- the logs


@pytest.fixture
def logging_restored():
    root, level, mine = logging.getLogger(), logging.getLogger("train").level, list(metrics._handlers)
    yield
    for handler in metrics._handlers:
        root.removeHandler(handler)
        handler.close()
    metrics._handlers[:] = mine
    logging.getLogger("train").setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("logging_restored")
def test_each_rank_has_a_log_and_the_main_process_a_voice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = logging.getLogger("train.something"), logging.getLogger("a.library")
    for rank in (1, 0):
        run = RunDir(tmp_path / f"run{rank}")
        metrics.start_logging(run, rank)
        ours.info("saved step 5 on rank %d", rank)
        theirs.info("chatter")
        theirs.warning("deprecated on rank %d", rank)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("through the warnings module", stacklevel=1)
        log = (run.logs / f"rank-{rank}.log").read_text()
        assert re.search(rf"^\d{{4}}-.* INFO train.something: saved step 5 on rank {rank}$", log, re.M)
        assert f"WARNING a.library: deprecated on rank {rank}" in log
        assert "through the warnings module" in log
        assert "chatter" not in log
        out, err = capsys.readouterr()
        assert out == ""
        if rank == 1:
            assert err == ""
        else:
            assert err.startswith("saved step 5 on rank 0\nwarning: deprecated on rank 0\n")
    assert "rank 0" not in (tmp_path / "run1" / "logs" / "rank-1.log").read_text()  # the second run closed the first
