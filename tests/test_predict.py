"""`train/predict.py`: a run's own figures again from its directory alone, and what `gearshift predict` writes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import ranks
from train import rundir
from train.checkpoint import CheckpointError
from train.data import DataError
from train.predict import open_trained, predict
from train.rundir import RunError


def figures(run: Path, step: int) -> dict[str, float]:
    """What the run wrote down when it evaluated at `step`."""
    row = next(row for row in ranks.metrics(run) if row["step"] == step)
    return {key: value for key, value in row.items() if key.startswith("eval_")}


@pytest.mark.parametrize("name", ["lm", "gpt2", "lora", "qlora", "alone", "classes", "backbone", "masks"])
@pytest.mark.parametrize("step", ["2", "last"])
def test_what_was_held_out_gives_the_figures_of_the_run(trained: Path, tmp_path: Path, name: str, step: str) -> None:
    """Averaged weights (gpt2, classes), adapters over a run and a directory, 4 bits, tiles: the same numbers again."""
    found = predict(trained / name, None, tmp_path, step=step, say=lambda _: None)
    wanted = figures(trained / name, 4 if step == "last" else int(step))
    other = figures(trained / name, 2 if step == "last" else 4)
    assert found
    assert found == {key: pytest.approx(wanted[key], rel=1e-6) for key in found}
    assert wanted != other  # so another step's weights would be seen
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"step": 4 if step == "last" else 2, **found}


def test_best_is_the_step_with_the_best_objective(trained: Path) -> None:
    for name in ("lm", "masks"):
        best = max if name == "masks" else min
        key = "eval_miou" if name == "masks" else "eval_loss"
        rows = [row for row in ranks.metrics(trained / name) if key in row]
        assert open_trained(trained / name).step == best(rows, key=lambda row: row[key])["step"]


def test_a_folder_with_masks_is_judged_and_drawn(trained: Path, tmp_path: Path) -> None:
    held = trained / "data" / "held"
    found = predict(trained / "masks", held, tmp_path, step="last", say=lambda _: None)
    assert found["eval_miou"] == pytest.approx(figures(trained / "masks", 4)["eval_miou"], rel=1e-6)
    for picture in (held / "images").glob("*.png"):
        mask, drawn = (Image.open(tmp_path / what / picture.name) for what in ("masks", "overlays"))
        assert mask.size == drawn.size == Image.open(picture).size
        assert set(np.unique(mask)) <= {0, 1}


def test_pictures_without_answers_give_files_and_no_figures(trained: Path, tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    shutil.copy(next((trained / "data" / "held" / "images").glob("*.png")), picture)
    assert predict(trained / "masks", picture, tmp_path / "out", say=lambda _: None) == {}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["masks", "overlays"]


def test_classes_come_as_a_table_with_probabilities(trained: Path, tmp_path: Path) -> None:
    found = predict(trained / "classes", trained / "data" / "classes", tmp_path, say=lambda _: None)
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert all(abs(float(row["left"]) + float(row["right"]) - 1) < 1e-5 for row in rows)
    right = [row["class"] == row["true"] == row["file"].split("/")[0] for row in rows]
    assert found["eval_accuracy"] == sum(right) / 16


def test_prompts_are_continued_the_same_each_time(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def f\nclass A\n")
    for out in ("a", "b"):
        assert predict(trained / "lm", tmp_path / "prompts.txt", tmp_path / out, say=lambda _: None) == {}
    first, second = ((tmp_path / out / "predictions.jsonl").read_text() for out in ("a", "b"))
    assert first == second
    assert [json.loads(line)["prompt"] for line in first.splitlines()] == ["def f", "class A"]


def test_answers_are_judged_as_the_run_judges_them(trained: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "3 + 1?"}, {"role": "assistant", "content": "4"}]
    shapes = [
        {"messages": turns},
        {"prompt": "3 + 1?", "completion": "4"},
        {"messages": turns[:1]},
        {"prompt": "3 + 1?"},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shapes))
    found = predict(trained / "lora", tmp_path / "asked.jsonl", tmp_path / "out", say=lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row.get("answer") for row in rows] == ["4", "4", None, None]
    assert len({row["continuation"] for row in rows}) == 1, "each of them asks the same"
    run = open_trained(trained / "lora")
    ids, carry = run.task._ids("3 + 1?", "4")  # type: ignore[attr-defined]
    with torch.no_grad():
        odds = run.model(input_ids=torch.tensor([ids])).logits.float().log_softmax(-1)[0]
    wanted = [-float(odds[at - 1, ids[at]]) for at in range(1, len(ids)) if carry[at]]
    assert len(wanted) >= 2, "the answer and its end"
    assert found["eval_loss"] == pytest.approx(np.mean(wanted), rel=1e-4)

    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match="line 2: the fields prompt, of which none is a prompt in words"):
        predict(trained / "lora", tmp_path / "wrong.jsonl", tmp_path / "out", say=lambda _: None)
    with pytest.raises(DataError, match=r"line 1: .*learned from text"):
        predict(trained / "lm", tmp_path / "asked.jsonl", tmp_path / "out", say=lambda _: None)


def test_an_answer_ends_where_the_base_says_that_it_ends(trained: Path) -> None:
    """By a token that only the base's generation_config.json names."""
    run = open_trained(trained / "alone")
    task: Any = run.task
    wanted, more = (task._tokenizer.encode([text])[0].tolist() for text in ("4 b", " and more"))
    stop = next(token for token in range(task.info["vocab_size"]) if token not in (*task._ends, *wanted, *more))
    assert task._decode([*wanted, stop, *more]) != "4 b"
    file = Path(str(run.cfg.model.path)) / "generation_config.json"
    before = file.read_bytes() if file.exists() else None
    file.write_text(json.dumps({"eos_token_id": [stop]}))
    try:
        del task._ends
        assert task._decode([*wanted, stop, *more]) == "4 b"
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def test_the_directory_is_enough(trained: Path, tmp_path: Path) -> None:
    """Elsewhere, without the data it learned from; without the base it adapted it says what to give."""
    run = shutil.copytree(trained / "lm", tmp_path / "moved")
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace(str(trained / "data"), "/nowhere"))
    (tmp_path / "prompts.txt").write_text("def f\n")
    predict(run, tmp_path / "prompts.txt", tmp_path / "out", say=lambda _: None)
    with pytest.raises(DataError, match="/nowhere"):
        predict(run, None, tmp_path / "out", say=lambda _: None)
    adapted = shutil.copytree(trained / "lora", tmp_path / "adapted")
    moved = [f"model.path={run}"]
    here, there = (open_trained(path, overrides=o).model for path, o in ((trained / "lora", []), (adapted, moved)))
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters()))


def test_full_precision_undoes_the_four_bits(trained: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantised, whole = (open_trained(trained / "qlora", full_precision=on).model for on in (False, True))
    weights = dict(whole.named_parameters())
    for name, parameter in quantised.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, weights[name])
        elif "q_proj" in name:
            assert parameter.dtype == torch.uint8
            assert weights[name].dtype == torch.float32


def test_refusals_say_what_to_do(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="gearshift status"):
        open_trained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
        open_trained(trained / "lm", 3)
    with pytest.raises(CheckpointError, match="of another model"):
        open_trained(trained / "lm", overrides=["model.hidden_size=64"])
    run = shutil.copytree(trained / "lm", tmp_path / "run")
    facts = json.loads((run / "data.json").read_text())
    facts["fingerprints"]["data"] = "0" * 64
    (run / "data.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="its data has changed:\n  data: 000"):
        predict(run, None, tmp_path / "out", say=lambda _: None)


@pytest.mark.pulse
def test_the_command(trained: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "launch",
        "predict",
        trained / "masks",
        trained / "data" / "held",
        "--to",
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("eval_miou ")
    wrong = [*command[:4], tmp_path, "--to", tmp_path]
    done = subprocess.run(list(map(str, wrong)), cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == rundir.EXIT_CONFIG
    assert "is not a run directory" in done.stderr
