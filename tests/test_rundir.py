"""The run directory: nothing is ever half-written, one owner at a time, results mean what the exit codes say."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from train import config, describe, rundir
from train.rundir import Held, Lock, LockLost, RunDir, RunError

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def child(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """A Python process that runs `code`; its stdout is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
    )


# -------------------------------------------------------------------------------------------------------- writing


def test_atomic_write_killed_at_any_instant_leaves_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    code = """
import sys
from dataclasses import replace
from pathlib import Path
from train.rundir import atomic_write
path, n = Path(sys.argv[1]), 0
while True:
    n += 1
    atomic_write(path, str(n % 10) * 200_000)
    if n == 1:
        print("ready", flush=True)
"""
    for delay in (0.0, 0.003, 0.007, 0.02, 0.05):
        process = child(code, path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        content = path.read_text()
        assert len(content) == 200_000
        assert len(set(content)) == 1


def test_failed_atomic_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.yaml"
    rundir.atomic_write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        rundir.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_nothing_is_ever_writable_by_others(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run = RunDir(tmp_path / "root" / "run").create()
        run.event("start", attempt=1)
        run.write_result("running", 1)
        run.ask_to_stop("test")
        Lock.acquire(run).release()
    finally:
        os.umask(before)
    for path in (tmp_path / "root").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o027 == 0, f"{path}: {mode:o}"
        assert mode & mask == 0


def test_jsonl_tolerates_a_torn_last_line_and_no_other(run: RunDir) -> None:
    rundir.append_lines(run.metrics, [{"step": 1}, {"step": 2}])
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    assert rundir.read_jsonl(run.metrics) == [{"step": 1}, {"step": 2}]
    rundir.append_line(run.metrics, {"step": 3})  # what would happen if nobody cut the torn end
    rundir.append_line(run.metrics, {"step": 4})
    with pytest.raises(RunError, match="line 3"):
        rundir.read_jsonl(run.metrics)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0" * 5000, b'\0\0\n{"st', b"", b"\n"])
def test_the_next_owner_cuts_what_a_crash_left(run: RunDir, torn: bytes) -> None:
    rundir.append_lines(run.metrics, [{"step": 1}, {"step": 2}])
    with run.metrics.open("ab") as file:
        file.write(torn)
    Lock.acquire(run).release()
    rundir.append_line(run.metrics, {"step": 3})
    assert [row["step"] for row in rundir.read_jsonl(run.metrics)] == [1, 2, 3]


def test_lines_of_several_writers_never_mix(run: RunDir) -> None:
    def write(name: str) -> None:
        for n in range(200):
            rundir.append_line(run.events, {"name": name, "n": n, "pad": name * 500})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = rundir.read_jsonl(run.events)
    assert len(rows) == 800
    assert all([row["n"] for row in rows if row["name"] == name] == list(range(200)) for name in "abcd")


def test_numbers_that_json_does_not_have_become_null(run: RunDir) -> None:
    rundir.append_line(run.metrics, {"loss": float("nan"), "loss_hex": "nan", "eval": {"x": [1.0, float("inf")]}})
    row = json.loads(run.metrics.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert row == {"loss": None, "loss_hex": "nan", "eval": {"x": [1.0, None]}}


def test_events_carry_both_clocks(run: RunDir) -> None:
    before = time.monotonic()
    run.event("start", attempt=1)
    run.event("end", attempt=1, status="finished")
    first, second = rundir.read_jsonl(run.events)
    assert before - 1e-5 <= first["t"] <= second["t"]
    assert abs(first["time"] - time.time()) < 60
    assert second["status"] == "finished"


# ----------------------------------------------------------------------------------------------- names and results


def settings(name: str | None, root: Path | str = "runs") -> SimpleNamespace:
    return SimpleNamespace(experiment="lm_stdlib", run=SimpleNamespace(name=name, root=str(root)))


def test_default_name_is_experiment_and_hash(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rundir.resolve(settings(None), "0123456789abcdef").path == tmp_path / "runs" / "lm_stdlib-01234567"
    assert rundir.resolve(settings("mine", "~/r"), "0" * 64).path == Path.home() / "r" / "mine"


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        ".hidden",
        "-rf",
        "a/b",
        "../x",
        "/etc",
        "a\0b",
        "a\nb",
        "$(id)",
        "a;b",
        "a b",
        "'",
        '"',
        "‮abc",
        "x" * 97,
    ]
    + ["a\\b", "%2e%2e", "~", "*", "a\n"],
)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(RunError, match="is not a name") as caught:
        rundir.resolve(settings(name), "0" * 64)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        ("finished", None, 0),
        ("stopped", "signal SIGTERM", 75),
        ("failed", "bad_config", 2),
        ("failed", "does_not_fit", 3),
        ("failed", "out_of_memory", 12),
        ("failed", "nonfinite", 1),
        ("failed", None, 1),
        ("running", None, 1),
    ],
)
def test_exit_codes(run: RunDir, status: str, reason: str | None, code: int) -> None:
    run.write_result(status, 3, reason=reason, steps=7)
    result = run.result()
    assert result is not None
    assert (result["status"], result["attempt"], result["reason"], result["steps"]) == (status, 3, reason, 7)
    assert rundir.exit_code(result) == code


def test_no_result_is_a_failure_and_a_wrong_status_an_error(run: RunDir) -> None:
    assert run.result() is None
    assert rundir.exit_code(None) == 1
    with pytest.raises(ValueError, match="done"):
        run.write_result("done", 1)


def test_stop_requests(run: RunDir) -> None:
    assert run.stop_reason() is None
    run.stop.touch()
    assert run.stop_reason() == "STOP file"
    run.clear_requests()
    run.ask_to_stop("signal SIGTERM")
    run.ask_to_stop("signal SIGINT")
    assert run.stop_reason() == "signal SIGTERM"
    run.save.touch()
    run.clear_requests()
    assert run.stop_reason() is None
    assert not run.save.exists()


# ------------------------------------------------------------------------------------------------------------ lock

HOLD = """
import sys, time
from train.rundir import Lock, RunDir
lock = Lock.acquire(RunDir(sys.argv[1]), heartbeat_s=0.05)
print(lock.attempt, flush=True)
time.sleep(60)
"""


def test_a_live_owner_refuses_the_second_and_names_itself(run: RunDir) -> None:
    process = child(HOLD, run.path)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    before = time.monotonic()
    with pytest.raises(Held, match=rf"attempt 1 \(process {process.pid} on "):
        Lock.acquire(run)
    assert time.monotonic() - before < 1
    process.kill()
    process.wait()
    lock = Lock.acquire(run)  # at once: its process is gone
    assert time.monotonic() - before < 2
    assert lock.attempt == 2
    lock.release()


def test_a_zombie_owner_is_dead(run: RunDir) -> None:
    process = child(HOLD, run.path)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()  # and not waited for: it stays in the process table
    time.sleep(0.2)
    Lock.acquire(run).release()
    process.wait()


def test_the_same_process_id_started_later_is_another_process(run: RunDir) -> None:
    lock = Lock.acquire(run)
    owner = rundir.holder(run)
    assert owner is not None
    rundir.atomic_write(next(run.lock.glob("*.json")), json.dumps({**owner, "started": "1"}))
    assert Lock.acquire(run).attempt == 2
    with pytest.raises(LockLost, match="attempt 2"):
        lock.check()


def elsewhere(run: RunDir, attempt: int = 1, **fields: object) -> dict:
    """A lock that a process on another host holds."""
    owner = {"attempt": attempt, "token": "t", "host": "node9", "machine": "other", "pid": 1, "started": "1", "beat": 0}
    owner |= {"job": None, "job_start": 0, "released": False, **fields}
    rundir.atomic_write(run.lock / f"{attempt:08d}.json", json.dumps(owner))
    return owner


def test_an_owner_elsewhere_is_dead_only_after_patience(run: RunDir) -> None:
    elsewhere(run)
    said: list[str] = []
    before = time.monotonic()
    lock = Lock.acquire(run, patience_s=0.5, say=said.append)
    assert 0.5 <= time.monotonic() - before < 3
    assert lock.attempt == 2
    assert len(said) == 1
    assert "node9" in said[0]
    lock.release()


def test_an_owner_elsewhere_that_beats_is_alive(run: RunDir) -> None:
    owner = elsewhere(run)

    def beat() -> None:
        time.sleep(0.3)
        elsewhere(run, beat=owner["beat"] + 1)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(Held, match="node9"):
        Lock.acquire(run, patience_s=20)
    thread.join()


def test_an_earlier_start_of_the_same_slurm_job_is_dead_at_once_and_no_other(run: RunDir, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for fields, at_once in (
        ({"job": "77", "job_start": 1}, True),
        ({"job": "77", "job_start": 2}, False),
        ({"job": "78", "job_start": 1}, False),
    ):
        elsewhere(run, attempt=run.last_attempt() + 1, **fields)
        before = time.monotonic()
        Lock.acquire(run, patience_s=0.4).release()
        assert (time.monotonic() - before < 0.4) is at_once


def test_bury_frees_a_lock_and_its_owner_learns_of_it(run: RunDir) -> None:
    lock = Lock.acquire(run)
    owner = rundir.holder(run)
    assert owner is not None
    rundir.bury(run, owner)
    rundir.wait_until_free(run)
    with pytest.raises(LockLost):
        lock.check()
    lock.release()  # of a lost lock: silent, and changes nothing


def test_check_notices_that_the_lock_was_taken_or_removed(run: RunDir) -> None:
    lock = Lock.acquire(run)
    lock.check()
    elsewhere(run, attempt=5)
    with pytest.raises(LockLost, match="attempt 5"):
        lock.check()
    for file in run.lock.iterdir():
        file.unlink()
    with pytest.raises(LockLost, match="nobody"):
        lock.check()


def test_the_heartbeat_changes_the_lock_and_ends_with_release(run: RunDir) -> None:
    lock = Lock.acquire(run, heartbeat_s=0.02)
    first = rundir.holder(run)
    time.sleep(0.3)
    second = rundir.holder(run)
    assert first is not None
    assert second is not None
    assert second["beat"] > first["beat"]
    lock.release()
    after = rundir.holder(run)
    time.sleep(0.1)
    assert rundir.holder(run) == after
    assert after is not None
    assert after["released"]


def _race(path: str, barrier, results) -> None:
    barrier.wait()
    try:
        lock = Lock.acquire(RunDir(path))
    except Held:
        results.put(None)
    else:
        results.put(lock.attempt)
        time.sleep(3)  # longer than the slowest of the others needs


def test_of_many_that_start_at_once_one_wins(run: RunDir) -> None:
    process = child(HOLD, run.path)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()  # all of them find a dead owner to take over from
    barrier, results = SPAWN.Barrier(6), SPAWN.Queue()
    processes = [SPAWN.Process(target=_race, args=(str(run.path), barrier, results)) for _ in range(6)]
    for one in processes:
        one.start()
    answers = [results.get(timeout=60) for _ in processes]
    for one in processes:
        one.join()
    assert [answer for answer in answers if answer] == [2]


def test_attempts_go_on_in_a_copy_without_its_lock(run: RunDir, tmp_path: Path) -> None:
    run.event("start", attempt=4)
    run.write_result("stopped", 3)
    assert run.last_attempt() == 4
    lock = Lock.acquire(run)
    assert lock.attempt == 5
    lock.release()
    assert Lock.acquire(run).attempt == 6


# ----------------------------------------------------------------------------------------------- what people are told


def test_secrets_are_taken_out_and_settings_are_not(monkeypatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-0123456789")
    monkeypatch.setenv("SOME_PATH", "/data/plain")
    for text in (
        "x=canary-0123456789",
        "tracker.token=canary1",
        "password: canary2",
        "https://me:canary3@host/x",
        "data.path=hf_canary4canary4canary4",
        "AUTH_TOKEN='canary5'",
    ):
        assert "canary" not in describe.scrub(text), text
    for text in ("data.tokenizer=bytes", "train.max_tokens=1e9", "data.path=/data/plain", "model.path=org/name"):
        assert describe.scrub(text) == text


def test_env_info_says_what_ran_without_torch() -> None:
    code = """
import json, sys
from train.describe import env_info
info = env_info()
assert "torch" not in sys.modules
print(json.dumps(info))
"""
    process = subprocess.run(
        [sys.executable, "-c", code, "train.seed=1", "x_token=canary"], capture_output=True, text=True, check=True
    )
    info = json.loads(process.stdout)
    assert info["command"][1:] == ["train.seed=1", "x_token=***"]
    assert info["packages"]["torch"].startswith("2.")
    assert re.fullmatch("[0-9a-f]{40}", info["git"]["commit"])
    assert info["devices"]["cores"] >= 1


def test_the_result_as_text(run: RunDir, monkeypatch) -> None:
    monkeypatch.chdir(run.path.parent)
    (run.path / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    run.write_result(
        "finished",
        1,
        steps=300,
        tokens=1_228_800,
        wall_s=45.2,
        sample="def f():\n    return 1",
        metric="eval_loss",
        objective=1.77,
        eval={"eval_bpb": 2.55},
        baselines={"ngram2_bpb": 2.66, "xz9_bpb": 1.53},
        engine={"strategy": "ddp", "world_size": 2, "precision": "fp32"},
        predicted={"step_s": 0.2},
        measured={"step_s": 0.25},
    )
    text = describe.show_result(run)
    for part in (
        "run: finished",
        "300 steps",
        "1,228,800 tokens",
        "best eval_loss",
        "1.77",
        "2.55",
        "byte n-gram",
        "2.66",
    ):
        assert part in text, part
    for part in ("ddp, 2 rank(s), fp32", "0.25  (predicted 0.2)", "wandb sync run/wandb/offline-run-1-abc", "def f():"):
        assert part in text, part
    run.write_result("failed", 2, reason="out_of_memory")
    assert "failed (out_of_memory)" in describe.show_result(run)
    assert "rank-0.log" in describe.show_result(run)


# ---------------------------------------------------------------------------------------- a command against its run

DATA = {"data": "d" * 64}


def begin(run: RunDir, *overrides: str, precision: str = "fp32") -> None:
    """What the first attempt leaves, `auto` having become `precision`."""
    cfg = config.compose(overrides)
    rundir.freeze(cfg, run, replace(rundir.admit(cfg, run, DATA), precision=precision), attempt=1)


def test_where_how_and_watched_may_change_and_what_may_not(run: RunDir) -> None:
    begin(run, "train.max_steps=100")
    same = config.compose(
        ["train.max_steps=100", "hardware=gpu_24gb", "strategy=ddp", "numerics=exact", "eval.every=5", "run.stop_at=3"]
    )
    assert rundir.admit(same, run, DATA).changes == ()
    other = config.compose(["train.max_steps=200", "optim.betas=[0.9,0.99]"])
    with pytest.raises(RunError) as caught:
        rundir.admit(other, run, DATA)
    assert caught.value.code == 2
    message = str(caught.value)
    assert "train.max_steps: 100 -> 200" in message
    assert f"gearshift resume {run.path} 'optim.betas=[0.9,0.99]' train.max_steps=200 --accept" in message


def test_the_accepting_line_is_accepted_and_leaves_an_event(run: RunDir) -> None:
    begin(run, "train.max_steps=100")
    cfg = config.load(run.path, ["train.max_steps=200"])
    identity = rundir.admit(cfg, run, DATA, accept=True)
    assert identity.changes == ("train.max_steps: 100 -> 200",)
    rundir.freeze(cfg, run, identity, attempt=2)
    (event,) = rundir.read_jsonl(run.events)
    assert (event["kind"], event["attempt"], event["changes"]) == ("math_changed", 2, ["train.max_steps: 100 -> 200"])
    assert rundir.admit(config.load(run.path), run, DATA).changes == ()


def test_other_content_under_the_same_path_is_another_experiment(run: RunDir) -> None:
    begin(run)
    with pytest.raises(RunError, match=r"content.data: d+ -> e+\n.*gearshift resume \S+ --accept"):
        rundir.admit(config.compose([]), run, {"data": "e" * 64})


def test_auto_precision_is_hashed_as_written_and_kept_as_resolved(run: RunDir) -> None:
    begin(run, precision="bf16")
    frozen = config.load(run.path)
    assert frozen.train.precision == "bf16"
    written = config.math_hash(config.compose([]), DATA)
    for cfg in (frozen, config.compose([]), config.compose(["train.precision=bf16"])):
        identity = rundir.admit(cfg, run, DATA)
        assert (identity.math_hash, identity.precision) == (written, "bf16")
    with pytest.raises(RunError, match=r"train\.precision: auto -> fp32"):
        rundir.admit(config.compose(["train.precision=fp32"]), run, DATA)


def test_a_precision_that_was_named_is_not_auto(run: RunDir) -> None:
    begin(run, "train.precision=fp32")
    with pytest.raises(RunError, match=r"train\.precision: fp32 -> auto"):
        rundir.admit(config.compose([]), run, DATA)


def test_the_frozen_config_names_its_own_directory(run: RunDir) -> None:
    begin(run)
    frozen = config.load(run.path)
    assert rundir.resolve(frozen, "whatever").path == run.path
