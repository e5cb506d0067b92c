"""The planner in the product: the `plan` verb, layouts that runs take, what does not fit, memory that runs out, preflight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from train import config, rundir
from train.plan import choose
from train.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=1", "model.num_heads=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of a second. Its layout is planned: `gearshift plan` has left a trace."""
    root = tmp_path_factory.mktemp("planned")
    (root / "text").mkdir()
    for number in range(12):
        lines = (f"def f_{number}_{line}(x):\n    return x + {line * number}\n" for line in range(20))
        (root / "text" / f"{number}.py").write_text("\n".join(lines))
    words = [
        *("hardware=cpu", f"data.path={root}/text", f"data.cache_dir={root}/cache", "data.tokenizer=bytes", *NETWORK),
        *("data.seq_len=32", "optim.warmup_steps=0", "train.global_batch_size=4", "train.max_steps=4", "log.every=1"),
        *("train.precision=fp32", "tracker=none", "eval.max_samples=4", "eval.samples=0", f"run.root={root}/runs"),
    ]
    assert gearshift("plan", *words).returncode == 0
    return words


def gearshift(*words: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )


def run_dir(base: list[str], name: str) -> RunDir:
    return RunDir(Path(base[-1].partition("=")[2]) / name)


# --------------------------------------------------------------------------------------------------------- the verb


def test_a_plan_as_text_and_as_data_says_the_same(base: list[str]) -> None:
    text, data = gearshift("plan", *base), gearshift("plan", *base, "--json")
    best = json.loads(data.stdout)["plan"]
    assert best["fits"]
    assert f"{best['peak_memory_gib']:.2f} of" in text.stdout
    assert " ".join(best["overrides"]) in text.stdout


def test_what_does_not_fit_is_code_3_with_the_reason_and_priced_changes() -> None:
    asked = ("experiment=pretrain_1b", "hardware=gpu_8gb", "strategy=single")
    text = gearshift("plan", *asked)
    data = json.loads(gearshift("plan", *asked, "--json").stdout)
    assert text.returncode == rundir.EXIT_FIT
    assert "weights, gradients and optimizer state alone" in text.stdout
    assert data["changes"]
    assert all(change["plan"]["fits"] for change in data["changes"])


@pytest.mark.parametrize(("words", "part"), [(["nowhere"], "nowhere"), (["optim.lrr=1"], "optim.lr")])
def test_refusals_of_a_plan(words: list[str], part: str) -> None:
    wrong = gearshift("plan", *words)
    assert wrong.returncode == rundir.EXIT_CONFIG
    assert part in wrong.stderr


def test_a_difference_is_of_everything_that_would_run(base: list[str]) -> None:
    sides = ("--diff", "hardware=gpu_8gb", "hardware=node_8x80gb strategy=zero2")
    first, second = gearshift("plan", *sides, *base[1:]), gearshift("plan", *sides, *base[1:])
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    for part in ("+  devices_per_node: 8", '"stage": 2', "--num_processes 8", "What is learned is the same."):
        assert part in first.stdout
    other = gearshift("plan", "--diff", "optim.lr=1e-3", "optim.lr=2e-3", *base)
    assert "What is learned differs: optim.lr: 0.001 -> 0.002" in other.stdout


# ------------------------------------------------------------------------------------------------------------ choices


def test_a_choice_moves_no_math_and_lighter_layouts_are_lighter(base: list[str]) -> None:
    cfg = config.compose(base)
    here = choose.on_ranks(cfg, world_size=2, local_world_size=2, device="cpu")
    choice = choose.choose(here, {"vocab_size": 260, "train_samples": [100]})
    assert choice.strategy.name == "ddp"
    assert choice.plan is not None
    assert config.math_hash(config.compose([*base, *choose.settings(choice.plan)]), {"data": "d"}) == config.math_hash(
        cfg, {"data": "d"}
    )
    held = [p.peak_memory_gib for p in (choice.plan, *choice.lighter)]
    assert held == sorted(held, reverse=True)
    assert len(held) > 1


def test_without_a_trace_nothing_is_planned_and_that_is_said(base: list[str], tmp_path: Path) -> None:
    cfg = config.compose([*base, f"data.cache_dir={tmp_path}", "model.hidden_size=36"])
    choice = choose.choose(cfg, {}, take=False)
    assert (choice.plan, choice.strategy) == (None, cfg.strategy)
    assert "no trace" in choice.note


def test_what_was_counted_is_remembered(base: list[str], tmp_path: Path) -> None:
    cfg = config.compose([*base, f"data.cache_dir={tmp_path}"])
    assert choose.remembered(cfg) == {}
    choose.remember(cfg, {"train_samples": [7]})
    assert choose.remembered(cfg) == {"train_samples": [7]}
    assert choose.remembered(config.compose([*base, f"data.cache_dir={tmp_path}", "data.seq_len=16"])) == {}


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_run_takes_the_plan_and_ends_with_it_beside_what_was_measured(base: list[str]) -> None:
    done = gearshift("run", *base, "run.name=taken")
    assert done.returncode == 0, done.stderr
    run = run_dir(base, "taken")
    result, plan = ranks.result(run.path), json.loads(run.plan.read_text())
    assert result["engine"]["micro_batch_size"] == plan["micro_batch_size"] == 4
    assert {*result["predicted"]} == {*result["measured"]} == {"peak_memory_gib", "step_s", "tokens_per_s"}
    assert result["predicted"]["step_s"] == plan["step_s"]
    assert done.stdout.count("(predicted ") == 3
    left = gearshift("plan", str(run.path), "train.max_steps=10", "hardware=gpu_8gb", "--json")
    assert json.loads(left.stdout)["plan"]["steps"] == 6
    assert "nothing remains" in gearshift("plan", str(run.path)).stdout


def test_what_cannot_fit_does_not_start_unless_told_to(base: list[str]) -> None:
    small = "hardware.memory_gib=0.0002"
    refused = gearshift("run", *base, "run.name=large", small)
    assert refused.returncode == rundir.EXIT_FIT
    assert "Does not fit" in refused.stderr
    assert "run.fit=warn" in refused.stderr
    assert not run_dir(base, "large").path.exists()
    warned = gearshift("run", *base, "run.name=large", small, "run.fit=warn")
    assert warned.returncode == 0, warned.stderr
    assert "does not fit" in warned.stdout


def test_out_of_memory_tells_what_fits_and_replanning_goes_on(base: list[str]) -> None:
    words = ("run", *base, "checkpoint.every=1", "strategy.micro_batch_size=4")
    ended = gearshift(*words, "run.name=oom", GEARSHIFT_FAULT="oom:3:2")
    assert ended.returncode == rundir.EXIT_MEMORY
    (event,) = [e for e in rundir.read_jsonl(run_dir(base, "oom").events) if e["kind"] == "oom"]
    assert "strategy.micro_batch_size=2" in event["lighter"][0]
    assert event["predicted_gib"]
    assert event["measured_gib"] > 0
    assert "strategy.micro_batch_size=2" in ended.stderr
    went_on = gearshift(*words, "run.name=oom", "--on-oom=replan", GEARSHIFT_FAULT="oom:3:2")
    assert went_on.returncode == 0, went_on.stderr
    result = ranks.result(run_dir(base, "oom").path)
    assert (result["steps"], result["samples"], result["engine"]["micro_batch_size"]) == (4, 16, 2)
    assert result["math_hash"] == ranks.result(run_dir(base, "taken").path)["math_hash"]


@pytest.mark.ranks
def test_one_rank_out_of_memory_ends_all(base: list[str]) -> None:
    ended = gearshift("run", *base, "hardware.devices_per_node=2", "run.name=two", GEARSHIFT_FAULT="oom:2:1")
    assert ended.returncode == rundir.EXIT_MEMORY, ended.stderr
    assert ranks.result(run_dir(base, "two").path)["reason"] == "out_of_memory"
    (event,) = [e for e in rundir.read_jsonl(run_dir(base, "two").events) if e["kind"] == "oom"]
    assert event["rank"] == 1


LAYOUTS = {1: ["single", "ddp"], 2: ["ddp", "fsdp2", "zero1", "zero2", "zero3", "exact"]}


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_preflight_leaves_no_trace(base: list[str], world_size: int) -> None:
    def job(layout: str, wanted: bool) -> list[str]:
        how = "numerics=exact" if layout == "exact" else f"strategy={layout}"
        name = f"run.name={layout}-{world_size}-{wanted}"
        return [
            *base,
            how,
            name,
            "strategy.micro_batch_size=1",
            "optim.ema=0.9",
            f"run.preflight={str(wanted).lower()}",
        ]

    ranks.run_jobs(world_size, [job(layout, wanted) for layout in LAYOUTS[world_size] for wanted in (False, True)])
    for layout in LAYOUTS[world_size]:
        without, with_ = (run_dir(base, f"{layout}-{world_size}-{wanted}") for wanted in (False, True))
        assert ranks.result(without.path)["state_hash"] == ranks.result(with_.path)["state_hash"]
        assert without.ledger.read_text() == with_.ledger.read_text()
        losses = [[row["loss_hex"] for row in ranks.metrics(run.path)] for run in (without, with_)]
        assert losses[0] == losses[1]


FORGETS_NOTHING = """
from train.strategy import Strategy
Strategy.forget = lambda self: [seen.clear() for seen in self._seen.values()]
"""
"""But what it saw go through the model: that would end the run at its first step."""


def test_a_preflight_that_forgets_nothing_is_seen(base: list[str]) -> None:
    """The negative control: moments and counters that stay change every step that follows."""
    jobs = [
        [*base, "strategy=single", f"run.name=control-{wanted}", f"run.preflight={wanted}"]
        for wanted in ("false", "true")
    ]
    ranks.run_jobs(1, jobs, setup=FORGETS_NOTHING)
    hashes = {ranks.result(run_dir(base, f"control-{wanted}").path)["state_hash"] for wanted in ("false", "true")}
    assert len(hashes) == 2


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_the_plan_holds_on_a_card() -> None:
    """20 configurations against what is allocated and reserved, and the largest micro-batch under the caps."""
    done = subprocess.run([sys.executable, "benchmarks/plan_on_gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
