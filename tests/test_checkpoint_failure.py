"""Saves that fail: full and failing disks. What was saved before stays, the message says what is missing, the next one works."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ranks, trained
from tests.test_checkpoint_damage import One, processes
from train import checkpoint, rundir
from train.checkpoint import Checkpointer, CheckpointError, Reader
from train.config import CheckpointConfig
from train.rundir import RunDir

HASHES = {"math_hash": "0" * 64, "exec_hash": "1" * 64}


def saver(run: RunDir, attempt: int = 1) -> Checkpointer:
    return Checkpointer(run, processes(), One(0), CheckpointConfig(keep=9), hashes=HASHES, lock=None, attempt=attempt,
                        saved_step=None)  # type: ignore[arg-type]  # fmt: skip


def save(saver: Checkpointer, step: int) -> None:
    saver.save(step, {"best_step": None})
    saver.wait()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run").create()
    first = saver(run)
    save(first, 3)
    first.report("stop")
    return run


def whole(run: RunDir) -> list[int]:
    """Committed steps; each must verify."""
    for step in rundir.committed(run):
        Reader(run.checkpoint(step)).verify()
    return rundir.committed(run)


@pytest.mark.parametrize("operation", ["mkdir", "open", "fsync", "replace", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_leaves_the_old_and_the_next_save_works(
    code: int, operation: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes at the first, second, ... operation of its kind in the writing thread, until a save meets none."""
    real, reached = getattr(os, operation), 0
    count = 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        if threading.current_thread() is not threading.main_thread():
            count += 1
            if count == reached:
                raise OSError(code, os.strerror(code))
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, operation, failing)
    one, step = saver(run), 3
    while True:
        reached, count, step = reached + 1, 0, step + 1
        save(one, step)
        met = count >= reached
        if not met:
            break
        committed = step in whole(run)
        assert 3 in whole(run)
        if committed:  # what failed came after the commit
            one.report("continue")
            continue
        with pytest.raises(OSError, match=rf"{run.path}.*{os.strerror(code)}; 0\.0 MiB needed, [\d.]+ MiB free"):
            one.report("stop")
        assert not list(run.checkpoints.glob(".*")), "a full disk must get its space back"
    one.report("stop")
    assert reached > 1, f"no save uses {operation}"
    assert whole(run)[-1] == step


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB and 64 inodes."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "tmpfs", str(where)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small file system")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=False)


@pytest.mark.parametrize("resource", ["bytes", "inodes"])
def test_a_full_disk_is_told_with_path_need_and_free_and_survived(
    resource: str, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(small_disk / "run").create()
    one = saver(run)
    save(one, 3)
    fillers = []
    if resource == "bytes":
        fillers.append(small_disk / "filler")
        with fillers[0].open("wb") as file, pytest.raises(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))
        os.truncate(fillers[0], max(0, fillers[0].stat().st_size - 4096))  # room for lines, not for a checkpoint
    else:
        with pytest.raises(OSError):
            while True:
                fillers.append(small_disk / f"filler-{len(fillers)}")
                fillers[-1].touch()
    save(one, 6)
    one.report("continue")
    assert whole(run) == [3]
    assert f"the save of step 6 failed, older checkpoints stay: {run.path}" in caplog.text
    assert "No space left on device" in caplog.text
    assert ("0.0 MiB free" if resource == "bytes" else ", 0 inodes free") in caplog.text
    for filler in fillers:
        filler.unlink(missing_ok=True)
    save(one, 9)
    one.report("stop")
    assert whole(run) == [3, 9]


def test_a_rank_that_cannot_write_fails_the_save_of_all(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Checkpointer(run, processes(0, 2), One(0), CheckpointConfig(keep=9), hashes=HASHES, lock=None, attempt=1,
                       saved_step=None)  # type: ignore[arg-type]  # fmt: skip
    rundir.make_directory(run.checkpoints / ".step-00000006.1.tmp")  # as the other rank does before it writes
    one.save(6, {})
    checkpoint._leave_receipt(run.checkpoints / ".step-00000006.1.tmp", 1, {"error": "OSError: no room"})
    one.wait()
    with pytest.raises(CheckpointError, match=r"rank 1: (OSError: no room|the disk took not even the reason)"):
        one.report("stop")
    assert whole(run) == [3]


def test_the_best_stays_until_a_better_one_is_committed(run: RunDir) -> None:
    """`run` holds step 3. The save of step 6, the best by then, is lost; step 3 was the best before."""
    one = Checkpointer(run, processes(), One(0), CheckpointConfig(keep=1), hashes=HASHES, lock=None, attempt=1,
                       saved_step=3, best_step=3)  # type: ignore[arg-type]  # fmt: skip
    for step, best in ((9, 6), (12, 12), (15, 12)):
        one.save(step, {"best_step": best})
        one.wait()
        one.report("stop")
        assert whole(run) == {9: [3, 9], 12: [12], 15: [12, 15]}[step]
    assert checkpoint.find(run, "best") == run.checkpoint(12)


def test_what_goes_on_is_the_newest_attempt_and_not_the_highest_step(run: RunDir) -> None:
    """An attempt went back to step 3 and died, before its first commit or between that and the rotation."""
    save(saver(run), 9)
    run.event("resume", attempt=1, step=9)
    assert next(checkpoint.choose(run)) == run.checkpoint(9)
    run.event("resume", attempt=2, step=3)
    assert list(checkpoint.choose(run)) == [run.checkpoint(3)]
    back = saver(run, attempt=2)
    back._rotate = lambda *_: None  # type: ignore[method-assign]
    save(back, 6)
    assert list(checkpoint.choose(run)) == [run.checkpoint(6), run.checkpoint(3)]


def test_a_history_that_was_left_goes_with_the_first_commit_after_it(run: RunDir) -> None:
    """Attempt 1 saved 3, 6 and 9; attempt 2 went back to 3: a 6 of the other history must not be gone on from later."""
    first = saver(run)
    for step in (6, 9):
        save(first, step)
    back = Checkpointer(run, processes(), One(0), CheckpointConfig(keep=9), hashes=HASHES, lock=None, attempt=2,
                        saved_step=3)  # type: ignore[arg-type]  # fmt: skip
    assert whole(run) == [3, 6, 9]
    save(back, 8)
    assert whole(run) == [3, 8]


def test_what_a_kill_left_half_written_goes_at_the_next_start(run: RunDir) -> None:
    (run.checkpoints / ".step-00000009.1.tmp").mkdir()
    saver(run, attempt=2)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]


def test_no_torn_line_is_left_before_the_next(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = run.events.read_bytes(), os.write

    def half(descriptor: int, content: bytes) -> int:
        if len(content) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content[: len(content) - 10])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        run.event("save", step=6)
    monkeypatch.undo()
    assert run.events.read_bytes() == before


def test_moments_that_the_checkpoint_lacks_are_not_made_up(run: RunDir) -> None:
    other = One(0)
    other.kinds = lambda: ["master", "momentum_buffer"]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="goes on from momentum_buffer too"):
        checkpoint.load(other, Reader(run.checkpoint(3)))  # type: ignore[arg-type]


def test_a_damaged_newest_does_not_hide_the_best(run: RunDir) -> None:
    one = saver(run)
    for step in (6, 9):
        one.save(step, {"best_step": 6})
        one.wait()
    (run.checkpoint(9) / "manifest.json").unlink()
    assert checkpoint.find(run, "best") == run.checkpoint(6)


def test_a_buffer_that_changes_ends_the_run(run: RunDir) -> None:
    """A BatchNorm that learns statistics, say: no checkpoint would hold them."""
    changed = One(0)
    changed.changed_buffers = lambda: ["norm.running_mean"]  # type: ignore[method-assign]
    one = Checkpointer(run, processes(), changed, CheckpointConfig(keep=1), hashes=HASHES, lock=None, attempt=1,
                       saved_step=None)  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"norm\.running_mean.*keep it in evaluation mode"):
        one.save(6, {})


def test_rotation_leaves_a_save_alone_that_another_rank_has_begun(run: RunDir) -> None:
    """A rank whose file is written may be in the next save while the main process still rotates."""
    running = saver(run)
    for name in (".step-00000009.1.tmp", ".step-00000009.0.tmp", ".step-00000002.1.tmp", ".step-00000001.7.8.gone"):
        (run.checkpoints / name).mkdir()
    running._rotate(3, None)
    assert [path.name for path in run.checkpoints.glob(".*")] == [".step-00000009.1.tmp"]


FULL = """
from train import checkpoint, rundir
real, seen = checkpoint._write_file, {}
def full(directory, *rest):
    run = directory.parent.parent
    seen[run] = seen.get(run, 0) + 1
    if seen[run] == {"last": 3, "last-blocking": 3, "stopping": 1}.get(run.name, 2):
        raise OSError(28, "No space left on device")
    return real(directory, *rest)
checkpoint._write_file = full
"""


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str | None]]:
    """Runs whose second save fails, under both policies, and runs whose last one does."""
    root = tmp_path_factory.mktemp("policies")
    (root / "text").mkdir()
    (root / "text" / "a.py").write_text("\n".join(f"x_{i} = {i}" for i in range(900)))
    common = ["experiment=lm_stdlib", *trained.COMMON, *trained.LANGUAGE, *trained.NETWORK, "data.tokenizer=bytes"]
    common += [f"data.path={root}/text", f"run.root={root}", "train.max_steps=6", "eval.every=null"]
    jobs = [[*common, f"run.name={word}", f"checkpoint.on_error={word}"] for word in ("continue", "stop")]
    jobs += [[*common, "run.name=last"], [*common, "run.name=last-blocking", "checkpoint.asynchronous=false"]]
    jobs += [[*common, "run.name=stopping", "run.stop_at=2"]]
    return root, ranks.run_jobs(1, jobs, setup=FULL, check=False)


def test_a_run_goes_on_without_a_checkpoint_that_could_not_be_saved(policies: tuple[Path, list[str | None]]) -> None:
    root, errors = policies
    assert errors[0] is None
    assert ranks.result(root / "continue")["status"] == "finished"
    events = [json.loads(line) for line in (root / "continue" / "events.jsonl").read_text().splitlines()]
    failed = [event for event in events if event["kind"] == "save_failed"]
    assert [event["step"] for event in failed] == [4]
    assert "MiB needed" in failed[0]["error"]
    assert whole(RunDir(root / "continue")) == [2, 6]


@pytest.mark.parametrize(("name", "left"), [("last", [2, 4]), ("last-blocking", [2, 4]), ("stopping", [])])
def test_nothing_is_finished_or_stopped_whose_last_state_is_lost(
    name: str, left: list[int], policies: tuple[Path, list[str | None]]
) -> None:
    root, errors = policies
    error = errors[2 + ["last", "last-blocking", "stopping"].index(name)]
    assert "No space left on device" in (error or "")
    assert ranks.result(root / name)["status"] == "failed"
    assert whole(RunDir(root / name)) == left


def test_or_stops_if_that_is_the_policy(policies: tuple[Path, list[str | None]]) -> None:
    root, errors = policies
    assert "No space left on device" in (errors[1] or "")
    assert ranks.result(root / "stop")["status"] == "failed"
    assert whole(RunDir(root / "stop")) == [2]
