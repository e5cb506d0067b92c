"""The comparison with published figures: nothing is dropped, and a figure that is off is seen to be."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import plan_vs_published as published

KNOWN = {
    "id": "known", "subset": "here", "domain": "lm", "trust": "A", "model": "Llama tiny", "layers": "4", "hidden": "64",
    "heads": "4", "ffn": "128", "vocab": "256", "seq_len": "32", "method_n": "full", "precision_n": "bf16", "gpus": "8",
    "gpu_n": "A100-80GB", "micro_batch": "2", "act_ckpt_n": "none", "zero_n": "3", "sharding": "FSDP",
    "framework": "transformers", "peak_mem_gib": "1", "mem_metric": "allocated", "tokens_per_s_per_gpu": "1000", "fits": "no",
}  # fmt: skip
OTHERS = [
    {"id": "guess", "trust": "D"},
    {"id": "split", "tp": "8"},
    {"id": "mixture", "model": "Mixtral 8x7B"},
    {"id": "silent", "micro_batch": ""},
    {"id": "unnamed", "act_ckpt_n": ""},
    {"id": "strange", "precision_n": "fp12"},
    {"id": "unit unknown", "peak_mem_gib": "", "tokens_per_s_per_gpu": ""},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(published, "CACHE", tmp_path / "traces")
    published.traced.cache_clear()
    for name in ("memory", "throughput", "fits"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*KNOWN, "tp"])
            writer.writeheader()
            writer.writerows([KNOWN, *({**KNOWN, **other} for other in OTHERS)])
    return tmp_path


def test_every_row_is_predicted_or_named_with_a_reason(folder: Path) -> None:
    found = published.report(folder)
    for name in ("memory", "throughput"):
        part = found[name]
        assert list(part["rows"]) == ["known"]
        assert sum(part["out_of_scope"].values()) == 3
        assert {row for row, _ in part["unpredictable"]} == {"silent", "unnamed", "strange"}
        assert [row for row, _, _ in part["incomparable"]] == ["unit unknown"]
    fits = found["fits"]
    # Fully specified, so small that it fits, and said to fail: wrong, and counted so.
    assert fits["rates"]["fail"] == {"rows": 2, "right": 0.0}
    assert {row for row, _, _ in fits["wrong"]} == {"known", "unit unknown"}
    assert "| here | 1 |" in published.page(found, None)


def test_the_error_has_the_sign_of_the_prediction(folder: Path) -> None:
    predicted, _ = published.predict_memory(KNOWN)
    errors = [
        published.judged([{**KNOWN, "peak_mem_gib": str(predicted * times)}], published.predict_memory).all()[0]
        for times in (0.8, 1.0, 1.25)
    ]
    assert errors == pytest.approx([0.25, 0.0, -0.2])
    summed, _ = published.predict_memory({**KNOWN, "mem_scope": "sum over GPUs"})
    assert summed == pytest.approx(8 * predicted)
