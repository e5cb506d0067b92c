"""Text: the stream and its rows, what is held out, fingerprints, bad rows, the baselines, the prepared directory."""

from __future__ import annotations

import json
import lzma
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train import data
from train.config import Config, SourceConfig
from train.data import DataError, Prepared, cache, text, tokenizer

WORDS = ["while", "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "return", "none", "if"]


def document(number: int, lines: int = 12) -> str:
    rng = np.random.default_rng(number)
    return "".join(" ".join(rng.choice(WORDS, 6)) + f" {number}\n" for _ in range(lines))


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """Forty files, bytes for tokens, short rows."""
    for number in range(40):
        path = tmp_path / "docs" / f"d{number % 4}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(number))
    config = Config()
    config.data.path = str(tmp_path / "docs")
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.tokenizer = "bytes"
    config.data.seq_len = 32
    config.data.val_fraction = 0.2
    return config


def prepare(cfg: Config) -> Prepared:
    return data.prepare(cfg, lambda _: None)


def tokens(rows: Any) -> list[int]:
    """The stream behind a dataset."""
    return rows.stream.read(0, len(rows.stream)).tolist()


def split(prepared: Prepared, cfg: Config) -> tuple[list[str], list[str]]:
    """The training and the held-out documents, read back from the shards."""
    train, val = data.open_datasets(prepared, cfg)
    speller = tokenizer.Tokenizer(prepared.directory)
    back = [speller.decode(tokens(rows)).split(tokenizer.END)[1:] for rows in (*train, val)]
    return [doc for part in back[:-1] for doc in part], back[-1]


# ---- Stream and rows -------------------------------------------------------------------------------------------------


def test_every_document_once_in_order_each_after_a_separator(cfg: Config) -> None:
    prepared = prepare(cfg)
    train, val = split(prepared, cfg)
    names = sorted(f"d{n % 4}/{n}.txt" for n in range(40))
    held = [name for name in names if cache.held_out(name, cfg.data)]
    texts = {name: document(int(Path(name).stem)) for name in names}
    assert train == [texts[name] for name in names if name not in held]
    assert val == [texts[name] for name in held]
    assert 0 < len(val) < 20
    info = prepared.info
    assert (info["train_documents"], info["val_documents"]) == (len(train), len(val))
    assert info["val_bytes"] == sum(len(doc.encode()) for doc in val)
    assert info["val_tokens"] == info["val_targets"] + 1 == info["val_bytes"] + len(val)
    assert info["train_tokens"] == sum(map(len, train)) + len(train)


@pytest.mark.parametrize("length", [1, 7, 32, 10_000])
def test_every_held_out_token_but_the_first_is_predicted_once(length: int, cfg: Config) -> None:
    prepared = prepare(cfg)
    (train,), val = data.open_datasets(prepared, cfg)
    stream, rows = tokens(val), text.Rows(val.stream, length, "", whole=True)  # type: ignore[attr-defined]
    targets: list[int] = []
    for index in range(len(rows)):
        row = rows.get(index, 0, 0)
        assert row["input_ids"].shape == row["labels"].shape == (length,)
        assert row["input_ids"].dtype == row["labels"].dtype == np.int64
        assert row["input_ids"].min() >= 0
        real = row["labels"] != text.IGNORE
        assert row["input_ids"][real].tolist() == stream[len(targets) : len(targets) + real.sum()]
        targets += row["labels"][real].tolist()
    assert targets == stream[1:]
    assert len(targets) == prepared.info["val_targets"]
    rows = text.Rows(train.stream, length, "")  # type: ignore[attr-defined]
    got = [label for index in range(len(rows)) for label in rows.get(index, 0, 0)["labels"].tolist()]
    assert got == tokens(train)[1 : len(rows) * length + 1]
    assert len(tokens(train)) - 1 - len(got) < length  # the last, short row is dropped, and no more


def test_rows_run_across_shards(cfg: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = prepare(cfg)
    (one,), _ = data.open_datasets(whole, cfg)
    monkeypatch.setattr(text, "SHARD_BYTES", 200)
    cfg.data.cache_dir = str(tmp_path / "other")
    pieces = prepare(cfg)
    (many,), _ = data.open_datasets(pieces, cfg)
    assert len(many.stream.paths) > 20  # type: ignore[attr-defined]
    assert max(path.stat().st_size for path in many.stream.paths) == 200  # type: ignore[attr-defined]
    assert len(one) == len(many)
    for index in range(len(one)):
        a, b = one.get(index, 0, 0), many.get(index, 1, 9)
        assert all(np.array_equal(a[name], b[name]) for name in a)
    (_, shard), shards = pieces.info["streams"][0][1], pieces.info["streams"][0]
    assert shard == 100
    (pieces.directory / shards[1][0]).write_bytes(b"short")
    with pytest.raises(DataError, match="is damaged"):
        data.open_datasets(pieces, cfg)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    for dtype, value in (("<u2", 65535), ("<u4", 70_000)):
        writer = text._Writer(tmp_path, dtype[1:], np.dtype(dtype))
        writer.add(np.array([value, 1], np.uint32), 2)
        writer.close()
        assert text.Stream(tmp_path, writer.shards, dtype).read(0, 9).tolist() == [value, 1]


# ---- What is held out ------------------------------------------------------------------------------------------------


def test_validation_by_path_and_by_fold(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("held out " * 20)
    cfg.data.val_path = str(tmp_path / "val.txt")
    train, val = split(prepare(cfg), cfg)
    assert (len(train), val) == (40, ["held out " * 20])
    cfg.data.val_path = None
    cfg.data.folds = 3
    held: list[str] = []
    for fold in range(3):
        cfg.data.fold = fold
        train, val = split(prepare(cfg), cfg)
        assert not set(train) & set(val)
        assert len(train) + len(val) == 40
        held += val
    assert sorted(held) == sorted(document(n) for n in range(40))


def test_a_single_text_is_cut_between_lines(cfg: Config, tmp_path: Path) -> None:
    whole = "".join(document(n) for n in range(20))
    (tmp_path / "one.txt").write_text(whole)
    cfg.data.path = str(tmp_path / "one.txt")
    (train,), (val,) = split(prepare(cfg), cfg)
    assert train + val == whole
    assert train.endswith("\n")
    assert 0.15 < len(val) / len(whole) < 0.25
    cfg.data.fold, cfg.data.folds = 1, 4
    (before, after), (val,) = split(prepare(cfg), cfg)
    assert before + val + after == whole
    assert 0.2 < len(val) / len(whole) < 0.3


def test_of_few_texts_at_least_one_is_on_either_side(cfg: Config, tmp_path: Path) -> None:
    for count in (2, 3, 5):
        for fraction in (0.01, 0.99):
            root = tmp_path / f"{count}-{fraction}"
            root.mkdir()
            for number in range(count):
                (root / f"{number}.txt").write_text(document(number))
            cfg.data.path, cfg.data.val_fraction = str(root), fraction
            train, val = split(prepare(cfg), cfg)
            assert len(train) + len(val) == count
            assert min(len(train), len(val)) >= 1


def test_rows_are_held_out_by_content_so_copies_stay_together(cfg: Config, tmp_path: Path) -> None:
    rows = [document(n, 2) for n in range(60)] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    cfg.data.path = str(tmp_path / "rows.jsonl")
    train, val = split(prepare(cfg), cfg)
    assert len(train) + len(val) == 120
    assert not set(train) & set(val)
    assert set(Counter(train + val).values()) == {2}


# ---- Fingerprints and the cache --------------------------------------------------------------------------------------


def test_fingerprints_follow_content_and_split_not_place(cfg: Config, tmp_path: Path) -> None:
    first = prepare(cfg)
    shutil.copytree(tmp_path / "docs", tmp_path / "copied/elsewhere")
    cfg.data.path = str(tmp_path / "copied/elsewhere")
    assert prepare(cfg) == first
    cfg.data.seq_len = 16
    assert prepare(cfg).directory == first.directory  # rows are cut when they are read
    cfg.data.cache_dir = str(tmp_path / "another cache")
    assert prepare(cfg).fingerprints == first.fingerprints

    cfg.data.val_fraction = 0.3
    resplit = prepare(cfg).fingerprints
    (tmp_path / "copied/elsewhere/d0/0.txt").write_text("other\n" * 40)
    changed = prepare(cfg).fingerprints
    assert len({p["data"] for p in (first.fingerprints, resplit, changed)}) == 3
    cfg.data.tokenizer, cfg.data.tokenizer_vocab_size = "bpe", 280
    trained = prepare(cfg).fingerprints
    assert trained["data"] == changed["data"]
    assert trained["tokenizer"] != changed["tokenizer"] == first.fingerprints["tokenizer"]
    assert trained["tokenizer"] == cache.digest(prepare(cfg).directory / "tokenizer.json")


def test_the_tokenizer_is_trained_on_the_training_split_alone(cfg: Config, tmp_path: Path) -> None:
    cfg.data.tokenizer, cfg.data.tokenizer_vocab_size = "bpe", 300
    first = prepare(cfg)
    held = next(name for name in (f"d{n % 4}/{n}.txt" for n in range(40)) if cache.held_out(name, cfg.data))
    (tmp_path / "docs" / held).write_text("zzyzx " * 300)
    second = prepare(cfg)
    assert second.fingerprints["data"] != first.fingerprints["data"]
    assert second.fingerprints["tokenizer"] == first.fingerprints["tokenizer"]


def test_text_that_changes_while_it_is_read_is_refused(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(self: tokenizer.Tokenizer, texts: list[str]) -> list[np.ndarray]:
        (tmp_path / "docs/d0/0.txt").write_text("late\n" * 99)
        return encode(self, texts)

    encode = tokenizer.Tokenizer.encode
    monkeypatch.setattr(tokenizer.Tokenizer, "encode", meddle)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(cfg)
    monkeypatch.undo()
    assert prepare(cfg).info["rows"] == 40


def test_weights_of_the_model_are_fingerprinted_by_content(cfg: Config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tokenizer.save(prepare(cfg).directory, tmp_path / name)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    found = []
    for name in ("a", "b"):
        cfg.model.path = str(tmp_path / name)
        found.append(prepare(cfg).fingerprints["model"])
    (tmp_path / "b/model.safetensors").write_bytes(b"Weights")
    assert found[0] == found[1] != prepare(cfg).fingerprints["model"]
    cfg.model.path = str(tmp_path / "missing/x/y")
    with pytest.raises(DataError, match="no such directory"):
        prepare(cfg)


AGAIN = """
import sys, time
from train import data
from train.config import Config
cfg = Config()
cfg.data.path, cfg.data.cache_dir, cfg.data.tokenizer = "stdlib", sys.argv[1], "bytes"
times = []
for _ in range(3):
    begun = time.process_time()
    prepared = data.prepare(cfg, print)
    times.append(time.process_time() - begun)
heavy = {"torch", "transformers", "datasets", "tokenizers", "pyarrow", "huggingface_hub"} & set(sys.modules)
print(min(times), sorted(heavy), prepared.info["baselines"]["ngram2_bpb"], prepared.info["baselines"]["xz9_bpb"])
"""


def test_the_standard_library_the_second_time(tmp_path: Path) -> None:
    def run() -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", AGAIN, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        ).stdout.splitlines()

    first, second = run(), run()
    assert first[0].startswith("Preparing stdlib")
    assert len(second) == 1
    seconds, rest = second[0].split(" ", 1)
    assert float(seconds) < 0.3
    heavy, ngram, xz = rest.rsplit(" ", 2)
    assert heavy == "[]"
    assert 2.3 < float(ngram) < 2.9
    assert 1.2 < float(xz) < 1.8


# ---- Bad rows and too little -----------------------------------------------------------------------------------------


def test_bad_rows_are_set_aside_and_move_nothing(cfg: Config, tmp_path: Path) -> None:
    good = [json.dumps({"text": document(n, 2)}) for n in range(99)]
    bad = ['{"text": 7}', '{"body": "x"}', '{"text": null}', "not json", json.dumps({"text": "x" * 5000})]
    mixed = list(good)
    for number, line in enumerate(bad):
        mixed.insert(20 * number, line)
    cfg.data.max_row_bytes = 4000
    prepared = {}
    for name, lines in (("mixed", mixed), ("good", [*good, '{"text": ""}'])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines))
        cfg.data.path, cfg.data.max_bad_fraction = str(tmp_path / name), 0.05
        prepared[name] = prepare(cfg)
    assert split(prepared["mixed"], cfg) == split(prepared["good"], cfg)
    assert [prepared[name].info["bad_rows"] for name in prepared] == [5, 0]
    lines = (prepared["mixed"].directory / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 21, 41, 61, 81]
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons[0] == "field 'text' is a int, not a text"
    assert reasons[1] == "no field 'text' (data.text_field); it has body"
    assert reasons[2] == "field 'text' is null, not a text"

    cfg.data.path, cfg.data.max_bad_fraction = str(tmp_path / "mixed"), 0.04
    with pytest.raises(DataError) as caught:  # of what is prepared already, too
        prepare(cfg)
    told = str(caught.value)
    assert "5 of 104 rows are bad, more than data.max_bad_fraction=0.04" in told
    assert "a.jsonl: 5 bad (line 1: field 'text' is a int" in told
    assert "data.max_bad_fraction=0.049" in told


@pytest.mark.parametrize(
    ("files", "settings", "told"),
    [
        ({}, {}, "nothing in it is text or a table"),
        (
            {"a.txt": "tiny", "b.txt": "tiny"},
            {},
            r"gives 5 tokens for training, too few for one row: data\.seq_len=32 takes 33",
        ),
        ({"a.txt": "", "b.txt": ""}, {}, "gives 0 tokens"),
        ({"a.jsonl": '{"text": "' + "x" * 99 + '"}'}, {"val_fraction": 1e-9}, "No text is held out"),
        ({"a.txt": "x" * 999}, {"path": None}, r"data\.path is not set"),
        ({"a.txt": "x" * 999}, {"tokenizer": "bpe", "tokenizer_vocab_size": 99}, "at least 260"),
        ({"a.txt": "x" * 999}, {"val_path": "/nowhere.txt"}, "/nowhere.txt: there is no such file"),
        ({"a.txt": "x" * 999}, {"cache_dir": "/proc/none"}, r"/proc/none/text cannot be written.*data\.cache_dir"),
    ],
)
def test_too_little_and_wrong_settings_say_what_to_do(
    files: dict[str, str], settings: dict[str, Any], told: str, cfg: Config, tmp_path: Path
) -> None:
    root = tmp_path / "d"
    root.mkdir()
    for name, content in files.items():
        (root / name).write_text(content)
    cfg.data.path = str(root)
    for name, value in settings.items():
        setattr(cfg.data, name, value)
    with pytest.raises(DataError, match=told):
        prepare(cfg)


# ---- Several sources, samples for people, baselines ------------------------------------------------------------------


def test_several_sources_keep_their_own_rows(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"record {n} " * 20}) + "\n" for n in range(30)))
    cfg.data.sources = [SourceConfig(str(tmp_path / "docs"), 3.0), SourceConfig(str(tmp_path / "rows.jsonl"), 1.0)]
    cfg.data.path = None
    prepared = prepare(cfg)
    train, val = data.open_datasets(prepared, cfg)
    assert data.weights(cfg) == [3.0, 1.0]
    assert prepared.info["train_samples"] == [len(rows) for rows in train]
    speller = tokenizer.Tokenizer(prepared.directory)
    assert "record" not in speller.decode(tokens(train[0]))
    assert "dog" not in speller.decode(tokens(train[1]))
    assert {"record", "dog"} <= set(speller.decode(tokens(val)).split())
    cfg.data.sources[0].weight = 9.0
    assert prepare(cfg).directory == prepared.directory


def test_show_gives_the_first_three_samples_of_the_run(cfg: Config) -> None:
    prepared = prepare(cfg)
    shown = data.show(prepared, cfg)
    assert len(shown) == 3
    from train.order import Order

    (train,), _ = data.open_datasets(prepared, cfg)
    speller = tokenizer.Tokenizer(prepared.directory)
    for told, index in zip(shown, Order([len(train)], [1.0], 3, cfg.seed).ids(0).index.tolist()):
        row = train.get(index, 0, 0)
        assert told.startswith(f"source 0, row {index:,}: 32 tokens, 32 carry loss\n")
        assert f"«{speller.decode(row['labels'])}»" in told


def test_baselines_are_what_they_say() -> None:
    training, held = [document(n).encode() for n in range(8)], [document(n).encode() for n in (90, 91)]
    baselines = text.Baselines()
    for content in training[:4]:
        baselines.add(content, held=False)
    for content in held:
        baselines.add(content, held=True)
    for content in training[4:]:
        baselines.add(content, held=False)
    three: Counter[bytes] = Counter()
    two: Counter[bytes] = Counter()
    for content in training:
        padded = b"\0\0" + content
        for i in range(len(content)):
            three[padded[i : i + 3]] += 1
            two[padded[i : i + 2]] += 1
    bits = 0.0
    for content in held:
        padded = b"\0\0" + content
        for i in range(len(content)):
            bits -= math.log2((three[padded[i : i + 3]] + 1) / (two[padded[i : i + 2]] + 256))
    size = sum(map(len, held))
    packed = len(lzma.compress(b"".join(held), preset=9))
    found = baselines.results()
    assert found == {"ngram2_bpb": round(bits / size, 4), "xz9_bpb": round(8 * packed / size, 4)}
    assert text.Baselines().results() is None


def test_too_much_held_out_text_has_no_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BASELINE_BYTES", 100)
    baselines = text.Baselines()
    for _ in range(3):
        baselines.add(b"x" * 50, held=True)
        baselines.add(b"x" * 50, held=False)
    assert baselines.results() is None


def test_no_pickle_and_no_code_in_what_is_published(cfg: Config) -> None:
    names = {path.name for path in prepare(cfg).directory.iterdir()}
    assert {Path(name).suffix for name in names} == {".json", ".jinja", ".bin"}
    assert not [name for name in names if os.access(name, os.X_OK)]
