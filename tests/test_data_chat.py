"""Chats: their shapes, which tokens carry loss, packing, and that packed documents do not see each other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import config, data
from train.data import chat

QUESTION, ANSWER = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four."}
UNMARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWRITING = "{{ messages|length }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def prepared(tmp_path: Path, rows: list, *overrides: str) -> tuple[data.Prepared, config.Config]:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config.compose([
        "experiment=lm_stdlib", "data=chat", f"data.path={tmp_path}/chats.jsonl", f"data.cache_dir={tmp_path}/cache",
        "data.tokenizer=bytes", "data.glob=null", "data.seq_len=256", "data.val_fraction=0.3", *overrides,
    ])  # fmt: skip
    return data.prepare(cfg, lambda _: None), cfg


def test_every_shape_of_chat_becomes_messages() -> None:
    wanted = [QUESTION, ANSWER]
    assert chat.messages_of({"messages": wanted}) == wanted
    shared = [{"from": "human", "value": QUESTION["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    assert chat.messages_of({"conversations": shared}) == wanted
    assert chat.messages_of({"prompt": QUESTION["content"], "completion": ANSWER["content"]}) == wanted
    assert chat.messages_of({"prompt": [QUESTION], "completion": [ANSWER]}) == wanted
    assert chat.messages_of({"system": "", "tools": [], "conversations": shared}) == wanted
    system = {"role": "system", "content": "Be brief."}
    assert chat.messages_of({"system": "Be brief.", "conversations": shared}) == [system, *wanted]


@pytest.mark.parametrize(("row", "said"), [
    ({"question": "a", "answer": "b"}, "its fields are question, answer"),
    ({"messages": [QUESTION]}, "nobody answers"),
    ({"messages": [{"role": "user", "content": None}]}, "a role and a text are needed"),
    ({"prompt": 1, "completion": "x"}, "not both texts"),
    ({"messages": [QUESTION, {**ANSWER, "content": "", "tool_calls": [{"id": 1}]}]}, "tool_calls would be lost"),
    ({"messages": [QUESTION, {**ANSWER, "reasoning_content": "hm"}]}, "reasoning_content would be lost"),
    ({"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]}, "tools would be lost"),
])  # fmt: skip
def test_other_shapes_are_named(row: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chat.messages_of(row)


def test_only_the_assistants_words_carry_loss(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, {**ANSWER, "content": f"Four {i}."}]} for i in range(40)]
    found, cfg = prepared(tmp_path, rows)
    shown = chat.show(found, cfg)[0]
    carried = [part.split("»")[0] for part in shown.split("«")[1:]]
    assert carried
    assert all(words.startswith("Four ") and words.endswith(".<|im_end|>") for words in carried)


def test_a_template_without_marks_is_read_by_differences_and_refused_when_they_are_not_certain(tmp_path: Path) -> None:
    (tmp_path / "unmarked.jinja").write_text(UNMARKED)
    (tmp_path / "rewriting.jinja").write_text(REWRITING)
    rows = [{"messages": [QUESTION, {**ANSWER, "content": f"Four {i}."}]} for i in range(40)]
    found, cfg = prepared(tmp_path, rows, f"data.chat_template={tmp_path}/unmarked.jinja")
    carried = [part.split("»")[0] for part in chat.show(found, cfg)[0].split("«")[1:]]
    assert all(words.startswith("Four ") and words.endswith("\n") for words in carried)
    with pytest.raises(data.DataError, match="not certain"):
        prepared(tmp_path, rows, f"data.chat_template={tmp_path}/rewriting.jinja")


def test_a_template_that_says_the_date_says_the_same_one_every_day(tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %B %Y, %b %y') }}\n" + UNMARKED)
    rows = [{"messages": [QUESTION, {**ANSWER, "content": f"Four {i}."}]} for i in range(40)]
    found, _ = prepared(tmp_path, rows, f"data.chat_template={tmp_path}/dated.jinja")
    assert chat.Template(found.directory).prompt([QUESTION]).startswith("01 January 2026, Jan 26\n<user>")


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_packing_is_best_fit_decreasing(sizes: list[int]) -> None:
    rows = chat.best_fit(np.array(sizes), 64)
    loads = np.bincount(rows, weights=sizes)
    assert loads.max() <= 64
    assert loads.min() > 0
    rooms: list[int] = []  # the textbook algorithm, one document at a time
    for size in sorted(sizes, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= size]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(64 - size)
    assert len(loads) == len(rooms)


def test_log_normal_lengths_fill_the_rows() -> None:
    sizes = np.clip(np.exp(np.random.default_rng(0).normal(5.5, 0.9, 20_000)).astype(int), 2, 1024)
    rows = chat.best_fit(sizes, 1024)
    assert sizes.sum() / ((rows.max() + 1) * 1024) > 0.985


def test_a_million_documents_are_packed_in_moments() -> None:
    """Half a million a second is promised; measured at some five times that on two cores."""
    sizes = np.clip(np.exp(np.random.default_rng(0).normal(5.5, 0.9, 1_000_000)).astype(int), 2, 2048)
    begin = time.process_time()
    chat.best_fit(sizes, 2048)
    assert time.process_time() - begin < 4.0


def test_what_is_packed_is_said(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, {**ANSWER, "content": f"Four {i}."}]} for i in range(40)]
    said: list[str] = []
    found, cfg = prepared(tmp_path, rows)
    data.prepare(cfg, said.append)
    train = found.info["train_samples"][0]
    assert f"{train:,} rows of 256 positions to train on, {found.info['fill']:.1%} of them filled" in said[-1]


def test_packed_chats_do_not_see_each_other(tmp_path: Path) -> None:
    """The summed loss of packed rows is that of the chats each in a row of its own; without the mask it is not."""
    import torch

    from train import models, tasks
    from train.data.loader import Loader
    from train.order import Order

    rows = [
        {"messages": [{**QUESTION, "content": "Say " + "very " * (i % 7)}, {**ANSWER, "content": f"No {i}."}]}
        for i in range(30)
    ]
    found, cfg = prepared(tmp_path, rows, "model.num_layers=2")
    _, single = prepared(tmp_path, rows, "model.num_layers=2", "data.pack=false")
    task = tasks.TASKS["causal_lm"](cfg, found)
    model = models.initialise(task.build_model(), 0)

    def total(c: config.Config, forget: bool = False) -> tuple[float, int]:
        sets, _ = data.open_datasets(found, c)
        loader = Loader(
            sets,
            Order([len(sets[0])], [1.0], 1, 0),
            rank=0,
            world_size=1,
            micro_batch_size=4,
            seed=0,
            device="cpu",
            workers=1,
        )
        loss, count = 0.0, 0
        for batch in loader.eval_batches(sets[0]):
            if forget:
                batch["document"] = torch.ones_like(batch["document"])
            with torch.no_grad():
                part, n = task.loss(model, batch)
            loss, count = loss + float(part), count + int(n)
        loader.close()
        return loss, count

    (packed, n), (alone, m) = total(cfg), total(single)
    assert n == m
    assert len(data.open_datasets(found, cfg)[0][0]) < len(data.open_datasets(found, single)[0][0])
    assert packed == pytest.approx(alone, rel=1e-5)
    assert total(cfg, forget=True)[0] != pytest.approx(alone, rel=1e-5)
