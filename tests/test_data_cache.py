"""The cache: content is read once and known by content, directories appear whole, bad rows are counted and named."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from train.config import DataConfig
from train.data import DataError, cache


def tree(root: Path, files: dict[str, str]) -> list[tuple[str, Path]]:
    """Write files, as they were long ago."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        os.utime(root / name, (1e9, 1e9))
    return [(name, root / name) for name in sorted(files)]


def test_content_is_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.txt": "one", "b/c.txt": "two"}
    here = cache.identify(tmp_path / "cache", tmp_path / "x", tree(tmp_path / "x", files))
    there = cache.identify(tmp_path / "cache", tmp_path / "y", tree(tmp_path / "y", files))
    assert cache.fingerprint(here) == cache.fingerprint(there)
    renamed = cache.identify(tmp_path / "cache", tmp_path / "z", tree(tmp_path / "z", {"a.txt": "one", "d.txt": "two"}))
    edited = cache.identify(tmp_path / "cache", tmp_path / "w", tree(tmp_path / "w", {**files, "a.txt": "One"}))
    assert len({cache.fingerprint(ids) for ids in (here, renamed, edited)}) == 3


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tree(tmp_path / "x", {"a": "one", "b": "two"})
    monkeypatch.setattr(cache, "_RACY_NS", -(10**10))  # ctime cannot be set back, so call everything old
    read: list[str] = []
    digest = cache.digest
    monkeypatch.setattr(cache, "digest", lambda c: (isinstance(c, Path) and read.append(c.name)) or digest(c))

    def identify() -> list[str]:
        read.clear()
        return [file.sha256 for file in cache.identify(tmp_path / "cache", tmp_path / "x", files)]

    first = identify()
    assert read == ["a", "b"]
    assert identify() == first
    assert read == []
    tree(tmp_path / "x", {"b": "TWO"})  # same size, same mtime
    second = identify()
    assert read == ["b"]
    assert second[1] != first[1]
    next((tmp_path / "cache/index").iterdir()).write_text("torn {")
    assert identify() == second
    assert read == ["a", "b"]


def test_a_fresh_file_is_never_trusted(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    cache.identify(tmp_path / "cache", tmp_path, [("a", tmp_path / "a")])
    index = next(iter((tmp_path / "cache/index").glob("*.json")), None)
    assert index is None or json.loads(index.read_text()) == {}


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    (found,) = cache.identify(tmp_path / "cache", tmp_path / "x", tree(tmp_path / "x", {"a": "one"}))
    assert found.size == 3
    with pytest.raises(DataError, match=r"cannot be written.*data\.cache_dir"):
        cache.publish(tmp_path / "cache" / "text" / "k", lambda new: None)


def _publish(final: Path, gate: Path, text: str) -> None:
    def build(new: Path) -> None:
        for i in range(20):
            (new / f"{i}").write_text(text)
        while not gate.exists():
            time.sleep(0.001)

    cache.publish(final, build)


def test_two_that_prepare_the_same_both_succeed_and_one_wins(tmp_path: Path) -> None:
    final, gate = tmp_path / "text" / "key", tmp_path / "gate"
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_publish, args=(final, gate, text)) for text in "ab"]
    for process in both:
        process.start()
    time.sleep(0.2)
    assert not final.exists()
    gate.touch()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert len({(final / f"{i}").read_text() for i in range(20)}) == 1  # never a mixture
    assert [path.name for path in final.parent.iterdir()] == ["key"]  # nothing left over


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(new: Path) -> None:
        (new / "half").write_text("half")
        raise DataError("bad")

    with pytest.raises(DataError, match="bad"):
        cache.publish(tmp_path / "text" / "key", build)
    assert list((tmp_path / "text").iterdir()) == []


def test_what_is_published_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        cache.publish(tmp_path / "text" / "key", lambda new: (new / "file").write_text("x"))  # type: ignore[arg-type, return-value]
    finally:
        os.umask(old)
    assert (tmp_path / "text/key").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "text/key/file").stat().st_mode & 0o777 == 0o640


def test_abandoned_builds_are_swept_up(tmp_path: Path) -> None:
    for name, age in (("old", 30), ("new", 0)):
        (tmp_path / f".making-{name}").mkdir()
        os.utime(tmp_path / f".making-{name}", (time.time() - age * 86400,) * 2)
    cache.publish(tmp_path / "key", lambda new: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".making-new", "key"]


def test_held_out_by_name() -> None:
    names = [f"doc-{i}" for i in range(5000)]
    tenth = {name for name in names if cache.held_out(name, DataConfig(val_fraction=0.1))}
    fifth = {name for name in names if cache.held_out(name, DataConfig(val_fraction=0.2))}
    assert 400 < len(tenth) < 600
    assert tenth < fifth  # growing the fraction moves nothing back
    folds = [{name for name in names if cache.held_out(name, DataConfig(fold=i, folds=4))} for i in range(4)]
    assert sum(map(len, folds)) == 5000
    assert set().union(*folds) == set(names)
    assert not any(cache.held_out(name, DataConfig(val_path="elsewhere")) for name in names)


def test_the_quarantine_names_file_line_and_reason(tmp_path: Path) -> None:
    quarantine = cache.Quarantine(tmp_path / "q.jsonl")
    for line in range(1, 9):
        quarantine.good() if line % 4 else quarantine.bad("a.jsonl", line, "not JSON")
    quarantine.bad("b.txt", None, "invalid UTF-8")
    assert [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()] == [
        {"file": "a.jsonl", "line": 4, "reason": "not JSON"},
        {"file": "a.jsonl", "line": 8, "reason": "not JSON"},
        {"file": "b.txt", "line": None, "reason": "invalid UTF-8"},
    ]
    cache.check_bad(quarantine.rows, quarantine.bad_rows, quarantine.path, DataConfig(max_bad_fraction=0.34))
    with pytest.raises(DataError) as caught:
        cache.check_bad(quarantine.rows, quarantine.bad_rows, quarantine.path, DataConfig(max_bad_fraction=0.01))
    told = str(caught.value)
    assert "3 of 9 rows" in told
    assert "data.max_bad_fraction=0.334" in told
    assert "a.jsonl: 2 bad (line 4: not JSON)" in told
    assert "b.txt: 1 bad (invalid UTF-8)" in told
    assert str(quarantine.path) in told


def test_hopeless_data_is_not_read_to_its_end(tmp_path: Path) -> None:
    quarantine = cache.Quarantine(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match=r"first 1,000 rows are all bad.*\n.*no field"):
        for line in range(10**6):
            quarantine.bad("a.jsonl", line, "no field 'text'")
    assert quarantine.rows == 1000
