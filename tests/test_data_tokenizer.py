"""Tokenizers: what goes in comes out, the same text gives the same tokenizer, and others open what is saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import Config
from train.data import DataError, tokenizer

CORPUS = ["def f(x):\n    return x + 1\n" * 30, "Grüße, 世界! \U0001f600 " * 20, "while True:\n\tpass\r\n" * 20]


def make(word: str, directory: Path, cfg: Config | None = None, texts: list[str] = CORPUS) -> tokenizer.Tokenizer:
    cfg = cfg or Config()
    cfg.data.tokenizer = word
    cfg.data.tokenizer_vocab_size = 300
    cfg.data.cache_dir = str(directory.parent / "cache")
    directory.mkdir(parents=True)
    origin = tokenizer.locate(cfg, lambda _: None)
    return tokenizer.make(origin, directory, lambda: iter(texts), sum(map(len, texts)), cfg)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    return make(request.param, tmp_path_factory.mktemp("t") / request.param)


@settings(deadline=None, max_examples=100)
@given(st.text() | st.sampled_from(["", "a<|endoftext|>b", "<|im_start|>", "\r\n\t  \0x", "\ufeff\u2028"]))
def test_every_text_comes_back(made: tokenizer.Tokenizer, text: str) -> None:
    (ids,) = made.encode([text])
    assert ids.dtype == np.uint32
    assert made.decode(ids) == text
    assert all(made.vocab_size > i >= 0 for i in ids)
    assert made.separator not in ids  # text that spells a special token is text


def test_special_tokens(made: tokenizer.Tokenizer) -> None:
    assert made.backend.token_to_id(tokenizer.END) == made.separator == made.eos
    ids = [made.backend.token_to_id(word) for word in tokenizer.SPECIALS]
    assert len(set(ids)) == 4
    assert made.decode([made.separator, *made.encode(["x"])[0]]) == "<|endoftext|>x"


def test_a_byte_is_its_own_id(tmp_path: Path) -> None:
    made = make("bytes", tmp_path / "t")
    text = "".join(map(chr, range(300)))
    assert made.encode([text])[0].tolist() == list(text.encode())
    assert made.vocab_size == 260
    assert made.backend.encode(text, add_special_tokens=False).ids == list(text.encode())  # the shortcut agrees


def test_bpe_is_smaller_than_bytes_and_as_large_as_asked(tmp_path: Path) -> None:
    made = make("bpe", tmp_path / "t")
    assert made.vocab_size == 300
    assert len(made.encode([CORPUS[0]])[0]) < len(CORPUS[0]) / 2


def test_the_same_text_gives_the_same_tokenizer_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.test_data_tokenizer import make;"
        "print(make('bpe', Path(sys.argv[1]) / 't').content)"
    )
    there = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "there")],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1", "PATH": ""},
        cwd=Path(__file__).parent.parent,
    ).stdout.strip()
    assert make("bpe", tmp_path / "here").content == there
    assert make("bpe", tmp_path / "other", texts=CORPUS[1:]).content != there


def test_a_large_corpus_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number:09d}\n" for number in range(1000)]
    assert list(tokenizer._sample(iter(texts), 10_000)) == texts
    monkeypatch.setattr(tokenizer, "_TRAINING", 2000)
    chosen = [int(text) for text in tokenizer._sample(iter(texts), 10_000)]
    assert 150 < len(chosen) < 250
    assert {number // 100 for number in chosen} == set(range(10))  # from all of it
    assert [int(text) for text in tokenizer._sample(iter(texts), 0)] == list(range(401))  # unknown size: bounded


def test_long_documents_are_encoded_in_pieces(made: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CORPUS[0] + "x" * 500 + "\n" + CORPUS[1]
    whole = made.encode([text, "b"])
    monkeypatch.setattr(tokenizer, "_PIECE", 100)
    assert max(map(len, tokenizer._pieces(text))) <= 100
    pieces = made.encode([text, "b"])
    assert made.decode(pieces[0]) == made.decode(whole[0]) == text
    assert pieces[1].tolist() == whole[1].tolist()


def test_marks_show_what_carries_loss(tmp_path: Path) -> None:
    made = make("bytes", tmp_path / "t")
    ids = made.encode(["question answer"])[0].astype(np.int64)
    labels = np.append(ids[1:], -100)
    assert made.marked(ids, labels) == "q«uestion answer»"
    labels[:8] = -100
    assert made.marked(ids, labels) == "question «answer»"
    assert made.marked(ids, np.append(ids[1:], ord("!"))) == "q«uestion answer!»"
    assert made.marked(ids, np.full(len(ids), -100)) == "question answer"


@pytest.mark.parametrize("word", ["bytes", "bpe"])
def test_transformers_opens_it_with_a_chat_template(word: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = make(word, tmp_path / "t")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert loaded(CORPUS[1], add_special_tokens=False)["input_ids"] == made.encode([CORPUS[1]])[0].tolist()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token) == (made.separator, made.eos, tokenizer.PAD)
    assert len(loaded) == made.vocab_size
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho\n"}]
    text = loaded.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo\n<|im_end|>\n"
    asked = loaded.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    row = loaded.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(row["input_ids"], row["assistant_masks"]) if mask]
    assert loaded.decode(said) == "Ho\n<|im_end|>"


def test_a_tokenizer_of_others_is_taken_as_it_is(tmp_path: Path) -> None:
    make("bpe", tmp_path / "theirs")
    (tmp_path / "theirs/chat_template.jinja").write_text("theirs")
    settings = json.loads((tmp_path / "theirs/tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": tokenizer.END_OF_TURN, "special": True}
    del settings["bos_token"]
    (tmp_path / "theirs/tokenizer_config.json").write_text(json.dumps(settings))
    spec = json.loads((tmp_path / "theirs/tokenizer.json").read_text())
    spec["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(spec))

    made = make(str(tmp_path / "theirs"), tmp_path / "ours")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert made.separator == made.eos == made.backend.token_to_id(tokenizer.END_OF_TURN)  # no beginning: the end parts
    assert made.decode(made.encode([CORPUS[0]])[0]) == CORPUS[0]  # not cut to 4 tokens

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    tokenizer.save(tmp_path / "ours", run / "tokenizer")
    cfg = Config()
    cfg.model.path = str(run)
    assert make("bpe", tmp_path / "again", cfg).content == made.content  # `bpe` with model.path is the model's own


def test_the_identity_is_of_content_not_of_place(tmp_path: Path) -> None:
    make("bpe", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere/b")
    cfg = Config()
    cfg.data.cache_dir = str(tmp_path / "cache")

    def identity(**settings: object) -> str:
        for name, value in settings.items():
            setattr(cfg.data, name, value)
        return tokenizer.locate(cfg, lambda _: None).identity

    assert identity(tokenizer=str(tmp_path / "a")) == identity(tokenizer=str(tmp_path / "elsewhere/b"))
    (tmp_path / "a/tokenizer.json").write_text((tmp_path / "a/tokenizer.json").read_text() + "\n")
    template = tmp_path / "t.jinja"
    template.write_text("mine")
    found = {identity(tokenizer="bytes"), identity(tokenizer="bpe"), identity(tokenizer_vocab_size=512)}
    found |= {identity(tokenizer=str(tmp_path / "a")), identity(tokenizer=str(tmp_path / "elsewhere/b"))}
    found |= {identity(chat_template=str(template))}
    assert len(found) == 6


def test_a_chat_template_of_the_users_wins(tmp_path: Path) -> None:
    make("bpe", tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs/tokenizer_config.json").read_text())
    (tmp_path / "theirs/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "theirs"}))
    (tmp_path / "mine.jinja").write_text("mine")
    cfg = Config()
    cfg.data.chat_template = str(tmp_path / "mine.jinja")
    make(str(tmp_path / "theirs"), tmp_path / "ours", cfg)
    assert (tmp_path / "ours/chat_template.jinja").read_text() == "mine"
    assert "chat_template" not in json.loads((tmp_path / "ours/tokenizer_config.json").read_text())
    cfg.data.chat_template = str(tmp_path / "missing.jinja")
    with pytest.raises(DataError, match=r"data\.chat_template=.*cannot be read"):
        tokenizer.locate(cfg, lambda _: None)


def test_a_tokenizer_without_a_fast_file_is_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", "h", "e", "l", "o", "Ġ", "he", "ll"])}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "vocab.json").write_text(json.dumps(letters))
    (theirs / "merges.txt").write_text("#version: 0.2\nh e\nl l\n")
    (theirs / "config.json").write_text('{"model_type": "gpt2"}')
    made = make(str(theirs), tmp_path / "ours")
    assert made.encode(["hello"])[0].tolist() == [letters[token] for token in ("he", "ll", "o")]
    assert (tmp_path / "ours/tokenizer.json").is_file()


def test_wrong_words_say_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for word, told in (
        (f"{tmp_path}/file", "give bytes, bpe, a tokenizer's directory"),
        (f"{tmp_path}/empty", "holds no"),
    ):
        with pytest.raises(DataError, match=told):
            make(word, tmp_path / "ours" / word.rpartition("/")[2])
    cfg = Config()
    cfg.data.tokenizer_vocab_size = 100
    with pytest.raises(DataError, match="at least 260"):
        tokenizer.make(tokenizer.locate(cfg, print), tmp_path, lambda: iter(CORPUS), 1, cfg)
