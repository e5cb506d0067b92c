"""Sources: what a path means, in which order it is read, and what becomes of rows that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.config import Config
from train.data import DataError, documents


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    config = Config()
    config.data.cache_dir = str(tmp_path / "cache")
    return config


def read(path: Path | str, cfg: Config, columns: list[str] | None = None) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """Values and bad rows of a source."""
    bad: list[tuple[Any, ...]] = []
    source = documents.locate(str(path), cfg, lambda _: None)
    return [r.value for r in documents.records(source, cfg.data, lambda *b: bad.append(b), columns)], bad


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


# ---- What a path means -----------------------------------------------------------------------------------------------


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path, cfg: Config) -> None:
    root = write(tmp_path / "d", {"b.txt": "2", "a/z.py": "1", "é.md": "4", "c": "3", "B.txt": "0"})
    values, bad = read(root, cfg)
    assert values == ["0", "1", "2", "3", "4"]
    assert bad == []


def test_hidden_and_binary_files_are_left_out_and_told(tmp_path: Path, cfg: Config) -> None:
    files = {
        "a.txt": "a",
        ".git/config": "x",
        "__pycache__/a.pyc": "x",
        ".env": "x",
        "i.png": b"\x89PNG\0\0",
        "b.dat": b"\xff",
    }
    root = write(tmp_path / "d", files)
    said: list[str] = []
    source = documents.locate(str(root), cfg, said.append)
    assert [name for name, _ in source.files] == ["a.txt"]
    assert "reads 1 texts, leaves 2 files that are not text" in said[0]


def test_a_glob_takes_exactly_what_it_says(tmp_path: Path, cfg: Config) -> None:
    root = write(tmp_path / "d", {"a.txt": "a", "b/c.py": "c", "b/d.jsonl": '{"text": "d"}'})
    cfg.data.glob = "**/*.py"
    assert read(root, cfg)[0] == ["c"]
    cfg.data.glob = "*.rst"
    with pytest.raises(DataError, match=r"nothing in it matches data\.glob=\*\.rst"):
        read(root, cfg)
    cfg.data.glob = "../*"
    with pytest.raises(DataError, match=r"pattern of files below"):
        read(root, cfg)


def test_tables_or_texts_whichever_are_more_bytes(tmp_path: Path, cfg: Config) -> None:
    rows = '{"text": "row"}\n' * 10
    clone = write(tmp_path / "clone", {"README.md": "# Data", "data/x.jsonl": rows})
    assert read(clone, cfg)[0] == [{"text": "row"}] * 10
    code = write(tmp_path / "code", {"main.py": "x = 1\n" * 100, "table.csv": "a,b\n1,2\n"})
    assert read(code, cfg)[0] == ["x = 1\n" * 100]


def test_tables_named_after_splits_are_not_mixed(tmp_path: Path, cfg: Config) -> None:
    names = {"train": "data/train-00000-of-00001.jsonl", "test": "data/test.jsonl", "dev": "my_dev.jsonl"}
    root = write(tmp_path / "d", {name: json.dumps({"text": key}) for key, name in names.items()})
    assert read(root, cfg)[0] == [{"text": "train"}]
    cfg.data.split = "validation"
    assert read(root, cfg)[0] == [{"text": "dev"}]


def test_the_standard_library_without_its_tests(cfg: Config) -> None:
    source = documents.locate("stdlib", cfg, lambda _: None)
    names = {name for name, _ in source.files}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert len(names) > 400


def test_the_fingerprint_is_of_content_not_of_place(tmp_path: Path, cfg: Config) -> None:
    files: dict[str, str | bytes] = {"a.txt": "a", "b.txt": "b"}
    places = [write(tmp_path / name, files) for name in ("x", "deeper/y")]
    contents = [documents.locate(str(place), cfg, lambda _: None).content for place in places]
    assert contents[0] == contents[1]
    write(tmp_path / "x", {"b.txt": "c"})
    assert documents.locate(str(tmp_path / "x"), cfg, lambda _: None).content != contents[0]


@pytest.mark.parametrize("path", ["no/such/file.txt", "./nothing", "/nowhere/at/all", "corpus.jsonl"])
def test_a_missing_path_says_so_without_asking_the_hub(path: str, cfg: Config) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        documents.locate(path, cfg, lambda _: None)


# ---- Formats ---------------------------------------------------------------------------------------------------------

ROWS = [{"text": "one\nline", "n": 1}, {"text": "zwei, „quoted“", "n": 2}, {"text": '三 "x"', "n": 3}]


def test_every_table_gives_the_same_rows(tmp_path: Path, cfg: Config) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "t.csv").write_text('text,n\n"one\nline",1\n"zwei, „quoted“",2\n\n"三 ""x""",3\n')
    (tmp_path / "t.tsv").write_text('text\tn\n"one\nline"\t1\nzwei, „quoted“\t2\n"三 ""x"""\t3\n')
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "s.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as whole:
        whole.write_table(table, max_chunksize=2)
    for name in ("t.jsonl", "t.csv", "t.tsv", "t.parquet", "s.arrow", "f.arrow"):
        values, bad = read(tmp_path / name, cfg, ["text"])
        assert [row["text"] for row in values] == [row["text"] for row in ROWS], name
        assert bad == []


def test_a_byte_order_mark_is_not_text(tmp_path: Path, cfg: Config) -> None:
    mark = b"\xef\xbb\xbf"
    write(tmp_path, {"a.txt": mark + b"a", "a.jsonl": mark + b'{"text": "a"}', "a.csv": mark + b"text\na\n"})
    assert read(tmp_path / "a.txt", cfg)[0] == ["a"]
    assert read(tmp_path / "a.jsonl", cfg)[0] == read(tmp_path / "a.csv", cfg)[0] == [{"text": "a"}]


def test_what_datasets_saved_to_disk(tmp_path: Path, cfg: Config) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    parts["train"].save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "one", cfg, ["text", "n"])[0] == ROWS
    cfg.data.split = "test"
    assert read(tmp_path / "dict", cfg, ["text", "n"])[0] == ROWS[:1]
    cfg.data.split = "dev"
    with pytest.raises(DataError, match=r"data\.split= one of: train, test"):
        read(tmp_path / "dict", cfg)
    # A copy of a hub repository that says how it is read: by the library.
    header = "---\nconfigs:\n- config_name: small\n  data_files: s.jsonl\n---\n# About\n"
    copy = write(
        tmp_path / "copy", {"README.md": header, "s.jsonl": '{"text": "s"}\n', "big.jsonl": '{"text": "big"}\n'}
    )
    cfg.data.name, cfg.data.split = "small", "train"
    assert read(copy, cfg, ["text"])[0] == [{"text": "s"}]
    cfg.data.name = "none"
    with pytest.raises(DataError, match="small"):
        read(copy, cfg)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_table_without_the_field_lists_those_it_has(tmp_path: Path, cfg: Config, name: str) -> None:
    (tmp_path / "a.csv").write_text("title,body\nx,y\n")
    pq.write_table(pa.table({"title": ["x"], "body": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'. It has: title, body.*data\.text_field"):
        read(tmp_path / name, cfg, ["text"])


# ---- Bad rows --------------------------------------------------------------------------------------------------------


def test_bad_lines_are_named_and_the_good_do_not_move(tmp_path: Path, cfg: Config) -> None:
    cfg.data.max_row_bytes = 1000
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(6)]
    edge = b'{"text": "' + b"e" * (1000 - 12) + b'"}'
    assert len(edge) == 1000
    lines = [
        good[0], b'{"text": "\xff\xfe"}', good[1], b'{"text": "torn', good[2], b'["a", "list"]', good[3],
        b'{"text": "' + b"x" * 10**7 + b'"}', good[4], b'{"text": "\\ud800"}', edge, edge + b" ", good[5],
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    values, bad = read(tmp_path / "a.jsonl", cfg)
    expected = [json.loads(line) for line in (*good[:5], edge, good[5])]
    assert values == expected
    assert [(file, line) for file, line, _ in bad] == [("a.jsonl", line) for line in (2, 4, 6, 8, 10, 12)]
    reasons = [
        "invalid UTF-8: byte 0xff at 10",
        "not JSON",
        "not a JSON object but a list",
        "10,000,012 bytes, more than data.max",
    ]
    reasons += ["half of a surrogate pair", "1,001 bytes, more than data.max_row_bytes=1000"]
    for (_, _, reason), start in zip(bad, reasons, strict=True):
        assert start in reason
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join((*good[:5], edge, good[5])))
    assert read(tmp_path / "clean.jsonl", cfg) == (expected, [])


def test_nesting_without_end_is_bad(tmp_path: Path, cfg: Config) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"[" * 100_000 + b'\n{"text": "a"}')
    values, bad = read(tmp_path / "a.jsonl", cfg)
    assert values == [{"text": "a"}]
    assert "recursion" in bad[0][2]


def test_an_overlong_last_line_without_an_end_is_bad(tmp_path: Path, cfg: Config) -> None:
    cfg.data.max_row_bytes = 100
    for extra in (1, 2, 3, 500):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * (100 + extra))
        values, bad = read(tmp_path / "a.jsonl", cfg)
        assert (len(values), [line for _, line, _ in bad]) == (1, [2])


def test_bad_rows_of_a_csv(tmp_path: Path, cfg: Config) -> None:
    cfg.data.max_row_bytes = 1000
    content = b'text,n\ngood,1\n\xff\xfe,2\nfine,3\nshort\n"' + b"x" * 2000 + b'",5\nlast,6\n'
    (tmp_path / "a.csv").write_bytes(content)
    values, bad = read(tmp_path / "a.csv", cfg)
    assert [row["text"] for row in values] == ["good", "fine", "last"]
    assert [(line, reason[:11]) for _, line, reason in bad] == [
        (3, "invalid UTF"),
        (5, "1 fields, w"),
        (6, "not CSV: fi"),
    ]


def test_bad_rows_of_a_parquet_file(tmp_path: Path, cfg: Config) -> None:
    raw = pa.array([b"good", b"\xff", b"fine"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    values, bad = read(tmp_path / "a.parquet", cfg, ["text"])
    assert values == [{"text": "good"}, {"text": "fine"}]
    assert bad == [("a.parquet", 2, "invalid UTF-8: byte 0xff at 0")]


def test_broken_files_are_named_and_the_others_read(tmp_path: Path, cfg: Config) -> None:
    texts = write(tmp_path / "t", {"a.txt": "a", "b.txt": b"caf\xe9 latin-1", "c.txt": "c"})
    assert read(texts, cfg) == (["a", "c"], [("b.txt", None, "invalid UTF-8: byte 0xe9 at 3")])
    cfg.data.max_row_bytes = 10
    assert read(texts, cfg)[1] == [("b.txt", None, "12 bytes, more than data.max_row_bytes=10")]
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "whole.parquet")
    half = (tmp_path / "whole.parquet").read_bytes()[:-20]
    tables = write(tmp_path / "p", {"a.parquet": half, "b.parquet": (tmp_path / "whole.parquet").read_bytes()})
    values, bad = read(tables, cfg, ["text"])
    assert values == [{"text": "x"}]
    assert [(file, line) for file, line, _ in bad] == [("a.parquet", None)]
