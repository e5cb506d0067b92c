"""Plans of the shipped experiments: which layout, what it says where none fits, and that it never touches the math."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from train import config
from train import plan as planner
from train.compose import ConfigError
from train.plan import machines, subject
from train.plan.search import SAME, tiers
from train.plan.subject import Subject

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Traces of this module lie in one place of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def compose(*overrides: str):
    return config.compose(list(overrides))


def learned(cfg) -> dict:
    """What decides what is learned."""
    return {group: value for group, value in config.to_dict(cfg).items() if group in config.WHAT}


SMALL = ("experiment=lm_stdlib", "model.hidden_size=256", "model.num_layers=4")


def test_the_first_plan_needs_no_torch_and_under_three_seconds(tmp_path: Path) -> None:
    code = (
        "import sys; from train import config, plan\n"
        "best = plan.plan(config.compose(['experiment=lm_stdlib', 'hardware=cpu']))\n"
        "print(best.fits, best.strategy, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
                         capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert out.split() == ["True", "single", "False", "False"]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 3  # seconds, had it a core to itself


@pytest.mark.parametrize("tier", ["gpu_8gb", "gpu_24gb"])
@pytest.mark.parametrize("experiment", ["pretrain_124m", "segment", "classify"])
def test_a_card_is_filled(tier: str, experiment: str) -> None:
    """No micro-batch a ninth larger than the planned one would fit: powers of two alone would leave up to half of it empty."""
    words = (f"experiment={experiment}", f"hardware={tier}", "strategy=single", "train.global_batch_size=4096")
    words = (*words, "strategy.chunked_loss=false") if experiment == "pretrain_124m" else words
    best = planner.plan(compose(*words))
    assert best.fits
    assert not planner.plan(compose(*words, f"strategy.micro_batch_size={int(best.micro_batch_size / 0.9) + 1}")).fits


def test_shipped_traces_are_what_a_trace_would_be_now() -> None:
    """To write them again: python -c "import json; from train.plan.subject import *; SHIPPED.write_text(json.dumps(ship()))"."""
    shipped, fresh = json.loads(subject.SHIPPED.read_text()), subject.ship()
    if set(shipped) != set(fresh):
        pytest.skip("other versions of torch or transformers than those that the shipped traces are of")
    assert shipped == json.loads(json.dumps(fresh))


def test_auto_takes_the_simplest_of_the_fastest() -> None:
    plans = planner.search(compose(*SMALL, "hardware=gpu_24gb"))
    best, fitting = plans[0], [p for p in plans if p.fits]
    quickest = min(p.hours for p in fitting)
    assert best.fits
    assert best.strategy == "single"
    assert best.offload == "none"
    assert best.hours <= quickest * (1 + SAME)
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)


@pytest.mark.parametrize("tier", ["gpu_8gb", "node_4x24gb", "nodes_2x8x80gb"])
def test_a_layout_covers_the_batch_and_leaves_it_alone(tier: str) -> None:
    cfg = compose(*SMALL, f"hardware={tier}")
    before = learned(cfg)
    for p in planner.search(cfg):
        covered = p.micro_batch_size * p.gradient_accumulation_steps * p.ranks
        assert covered >= p.global_batch_size == cfg.train.global_batch_size
        assert p.micro_batch_size * (p.gradient_accumulation_steps - 1) < -(-p.global_batch_size // p.ranks)
        assert sum(p.memory_gib.values()) == pytest.approx(p.peak_memory_gib)
        assert sum(p.step_parts_s.values()) == pytest.approx(p.step_s)
        assert p.fits == (not p.reason)
    best = planner.plan(cfg)
    laid = compose(*SMALL, f"hardware={tier}", *best.overrides())  # what it says can be typed
    assert learned(laid) == before
    again = planner.plan(laid)
    assert (again.strategy, again.micro_batch_size, again.peak_memory_gib) == (
        best.strategy,
        best.micro_batch_size,
        best.peak_memory_gib,
    )


def test_a_strategy_by_name_keeps_its_levers() -> None:
    cfg = compose(
        *SMALL,
        "hardware=node_4x24gb",
        "strategy=zero2",
        "strategy.activation_checkpointing=2",
        "strategy.micro_batch_size=3",
    )
    plans = planner.search(cfg)
    assert {(p.strategy, p.activation_checkpointing, p.micro_batch_size, p.compile, p.offload) for p in plans} == {
        ("zero2", 2, 3, False, "none")
    }
    assert {p.chunked_loss for p in plans} == {False, True}
    assert {p.strategy for p in planner.search(compose(*SMALL, "hardware=node_4x24gb", "optim=adamw_8bit"))} == {"ddp"}
    assert {p.micro_batch_size for p in planner.search(compose(*SMALL, "hardware=gpu_8gb", "numerics=exact"))} == {1}


@pytest.fixture(scope="module")
def too_large():
    """A model of a billion parameters on a card with 8 GB, in rows that are too long for it as well."""
    return compose("experiment=pretrain_1b", "hardware=gpu_8gb", "data.seq_len=4096", "strategy=single")


def test_nothing_fits_says_why_and_what_would(too_large) -> None:
    best = planner.plan(too_large)
    assert not best.fits
    assert "weights, gradients and optimizer state alone" in best.reason
    found = planner.changes(too_large)
    assert found
    assert all(change.plan.fits for change in found)
    prices = [change.plan.usd for change in found]
    assert prices == sorted(prices)
    for change in found:
        given = {word.partition("=")[0]: word for word in ("hardware=gpu_8gb", "data.seq_len=4096", "strategy=single")}
        given |= {word.partition("=")[0]: word for word in change.overrides}
        laid = compose("experiment=pretrain_1b", *given.values())
        assert planner.plan(laid).fits  # the words do what they say
        assert change.learns == (learned(laid) != learned(too_large))
    text = planner.render([best], found)
    assert "Does not fit" in text
    assert all(" ".join(change.overrides) in text for change in found)


def test_activations_that_bind_are_named_and_shorter_rows_help() -> None:
    where = ("hardware=gpu_8gb", "hardware.memory_gib=1.2", "strategy=single", "strategy.chunked_loss=false")
    cfg = compose(*SMALL, *where, "data.seq_len=16384", "train.global_batch_size=1")
    best = planner.plan(cfg)
    assert not best.fits
    assert "the activations of one sample" in best.reason
    assert any(
        change.overrides[0].startswith("data.seq_len=") and change.learns
        for change in planner.changes(cfg, elsewhere=False)
    )


def test_all_hardware_is_a_row_per_tier_and_the_same_math() -> None:
    cfg = compose("experiment=pretrain_7b")
    rows = planner.all_hardware(cfg)
    assert [row.hardware for row in rows][: len(tiers())] == list(tiers())
    assert not rows[0].plan.fits
    assert rows[0].change is not None
    assert rows[-1].plan.fits
    assert {row.plan.global_batch_size for row in rows} == {1024}
    hours = rows[-1].plan.device_hours
    assert hours == pytest.approx(184_320, rel=0.15)  # Llama 2 7B, published
    text = planner.render_all(cfg.experiment, rows)
    assert text == planner.render_all(cfg.experiment, rows)
    assert "184,320 GPU-hours" in text
    assert "$20m" in text
    assert all(row.hardware in text for row in rows)


@pytest.mark.parametrize("experiment", ["classify_digits", "segment_digits", "pretrain_124m"])
def test_other_tasks_and_models_are_planned_too(experiment: str) -> None:
    assert planner.plan(compose(f"experiment={experiment}", "hardware=node_8x80gb", "data.path=x")).fits


def test_a_plan_is_plain_data_and_text() -> None:
    plans = planner.search(compose(*SMALL, "hardware=gpu_8gb"))
    data = json.loads(json.dumps(plans[0].to_dict()))
    assert data["peak_memory_gib"] == plans[0].peak_memory_gib
    assert data["overrides"] == plans[0].overrides()
    text = planner.render(plans)
    assert all(name in text for name in plans[0].memory_gib)
    assert f"{plans[0].peak_memory_gib:.2f}" in text
    assert "To name it: strategy=" in text


def test_lengths_in_epochs_need_counted_data() -> None:
    cfg = compose("experiment=classify", "hardware=gpu_8gb", "data.path=x")
    unknown = planner.plan(cfg)
    known = planner.plan(cfg, {"train_samples": [6400], "num_classes": 5})
    assert unknown.hours is None
    assert any("epochs" in text for text in unknown.assumed)
    assert known.steps == 60 * 6400 // 64
    assert known.hours > 0
    assert not any("classes" in text for text in known.assumed)


def test_traces_are_kept_under_all_that_they_depend_on(tmp_path: Path) -> None:
    cfg = compose(*SMALL, f"data.cache_dir={tmp_path}")
    asked = {"precision": "fp32", "mode": "autocast", "chunked": False, "device": "cpu"}
    first = Subject(cfg).trace(**asked)
    (file,) = (tmp_path / "traces").glob("*.json")
    assert json.dumps(Subject(cfg).trace(**asked).to_dict()) == json.dumps(first.to_dict())
    for change in ("model.hidden_size=128", "data.seq_len=512", "model.tie_embeddings=false"):
        assert Subject(compose(*SMALL, change))._key("fp32", "autocast", False, "cpu") != file.stem
    for same in ("optim.lr=1e-3", "train.global_batch_size=64", "hardware=gpu_8gb", "model.rope_theta=5e5"):
        assert Subject(compose(*SMALL, same))._key("fp32", "autocast", False, "cpu") == file.stem
    file.write_text('{"sections": [')
    assert Subject(cfg).trace(**asked).numel() == first.numel()  # a torn file is taken again


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.2),
        ("A100-80GB", 79.2),
        ("a100-40gb", 39.4),
        ("NVIDIA GeForce RTX 4090", 23.6),
        ("rtx4090-24gb", 23.6),
        ("H100-80GB", 79.1),
        ("NVIDIA H100 80GB HBM3", 79.1),
        ("Tesla V100-SXM2-32GB", 31.7),
        ("NVIDIA L4", 22.0),
    ],
)
def test_cards_are_known_by_all_their_names(name: str, memory: float) -> None:
    card = machines.find_card(name)
    assert card is not None
    assert card.memory_gib == memory


def test_an_unknown_card_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="rtx4090"):
        planner.plan(compose(*SMALL, "hardware=gpu_24gb", "hardware.gpu=rtx9999"))
    assert machines.find_card("rtx9999") is None


def test_a_smaller_cap_is_the_limit() -> None:
    cfg = compose(*SMALL, "hardware=gpu_24gb")
    whole = machines.machine_of(cfg.hardware).memory_bytes
    capped = machines.machine_of(dataclasses.replace(cfg.hardware, memory_gib=8)).memory_bytes
    assert capped == 8 * 2**30 < whole < 24 * 2**30
