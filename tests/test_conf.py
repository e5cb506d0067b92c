"""The groups that ship: every experiment on every hardware, what each side may hold, published dimensions."""

from __future__ import annotations

from itertools import product

import pytest

from train import config
from train.config import Config

OPTIONS = config.find_options(config.CONF)
FINGERPRINTS = {"data": "d" * 64, "model": "e" * 64}
GROUPS = {"experiment", "task", "model", "data", "optim", "peft", "train", "hardware", "slurm", "strategy", "tracker"}


def composed(*overrides: str) -> tuple[Config, str]:
    cfg = config.compose(overrides)
    return cfg, config.math_hash(cfg, FINGERPRINTS)


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_every_experiment_composes_with_every_hardware_and_keeps_its_hash(experiment: str) -> None:
    hashes = {composed(f"experiment={experiment}", f"hardware={hardware}")[1] for hardware in OPTIONS["hardware"]}
    assert len(hashes) == 1


def test_a_setting_that_came_later_leaves_the_hash_of_older_runs_alone() -> None:
    for key in config.ADDED:
        assert key not in dict(config.items(config.math_dict(composed()[0], FINGERPRINTS)))
    start, moved = (composed("experiment=finetune_qlora", *more)[1] for more in ([], ["peft.quant_exclude=[k_proj]"]))
    assert start != moved


def test_the_hash_moves_with_neither_strategy_slurm_tracker_nor_paths_but_with_what_is_learned() -> None:
    start = composed()[1]
    same = [
        *(f"strategy={name}" for name in OPTIONS["strategy"]),
        *(f"slurm={name}" for name in OPTIONS["slurm"]),
        *(f"tracker={name}" for name in OPTIONS["tracker"]),
        "numerics=exact", "data.path=/elsewhere", "data.cache_dir=/elsewhere", "data.workers=0", "run.name=other",
        "run.root=/elsewhere", "eval.every=7", "log.every=1", "checkpoint.every=5", "strategy.micro_batch_size=2",
    ]  # fmt: skip
    assert {line: composed(line)[1] for line in same} == dict.fromkeys(same, start)
    other = ["seed=1", "optim=sgd", "model=gpt2", "train.precision=bf16", "train.global_batch_size=8", "optim.lr=1e-4",
             "train.max_steps=9", "data.seq_len=64", "data.fold=1", "experiment=pretrain_124m"]  # fmt: skip
    hashes = [composed(line)[1] for line in other]
    assert len({start, *hashes}) == len(other) + 1


def test_groups_and_options_are_those_of_the_contract() -> None:
    assert set(OPTIONS) - {"local"} == GROUPS
    assert set(OPTIONS["hardware"]) == {
        "auto", "cpu", "gpu_8gb", "gpu_24gb", "node_4x24gb", "node_8x80gb", "nodes_2x8x80gb",
    }  # fmt: skip
    for group, key in (
        ("strategy", "strategy.name"),
        ("optim", "optim.name"),
        ("peft", "peft.name"),
        ("slurm", "slurm.name"),
    ):
        assert set(OPTIONS[group]) == set(config.leaves(Config)[key].hint.__args__)
    assert set(OPTIONS["model"]) == set(config.MODELS)
    assert set(OPTIONS["data"]) == set(config.KINDS)
    assert set(OPTIONS["task"]) == set(config.GOES_WITH)
    for group, name in product(("task", "model", "optim", "peft", "hardware", "slurm", "strategy"), ("name",)):
        for option, path in OPTIONS[group].items():
            assert config.read_yaml(path)[name] == option, path


def test_an_option_stays_in_its_group_and_an_experiment_on_its_side() -> None:
    for group, options in OPTIONS.items():
        for path in options.values():
            text = path.read_text()
            assert ("# @package _global_" in text) == (group == "experiment"), path
            assert not {"_target_", "${"} & set(text.split()), path
            if group not in ("experiment", "local"):
                keys = {f"{group}.{key.partition('[')[0]}" for key, _ in config.items(config.read_yaml(path))}
                assert keys <= set(config.leaves(Config)), path


PUBLISHED = {
    # tokens in a step, tokens in all, parameters of the published model
    "pretrain_124m": (491_520, 600_000 * 491_520, 124.4e6),
    "pretrain_1b": (2 * 2**20, 3e12, 1.10e9),
    "pretrain_7b": (4 * 2**20, 2e12, 6_738_415_616),
    "pretrain_70b": (4 * 2**20, 2e12, 68_976_648_192),
}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_pretraining_has_the_published_size_and_length(experiment: str) -> None:
    cfg, _ = composed(f"experiment={experiment}")
    per_step, in_all, parameters = PUBLISHED[experiment]
    m = cfg.model
    assert cfg.train.global_batch_size * cfg.data.seq_len == per_step
    assert cfg.train.max_tokens == in_all
    assert m.vocab_size is not None
    if m.name == "llama":
        assert m.num_kv_heads is not None
        assert m.intermediate_size is not None
        key_value = m.hidden_size // m.num_heads * m.num_kv_heads
        layer = m.hidden_size * (2 * m.hidden_size + 2 * key_value + 3 * m.intermediate_size + 2)
        total = m.num_layers * layer + m.hidden_size + m.vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
    else:  # GPT-2: biases, position embeddings, tied output
        layer = 12 * m.hidden_size**2 + 13 * m.hidden_size
        total = m.num_layers * layer + 2 * m.hidden_size + (m.vocab_size + cfg.data.seq_len) * m.hidden_size
    assert total == pytest.approx(parameters, rel=2e-3)


def test_the_default_is_small_real_and_needs_nothing() -> None:
    cfg, _ = composed()
    assert (cfg.experiment, cfg.data.path, cfg.data.tokenizer, cfg.data.seq_len) == ("lm_stdlib", "stdlib", "bpe", 128)
    assert (cfg.tracker.wandb, cfg.tracker.mode, cfg.hardware.name, cfg.strategy.name) == (
        True,
        "offline",
        "auto",
        "auto",
    )
    assert config.missing_inputs(cfg) == []


def test_tiers_grow() -> None:
    sizes = {}
    for name in ("gpu_8gb", "gpu_24gb", "node_4x24gb", "node_8x80gb", "nodes_2x8x80gb"):
        hardware = composed(f"hardware={name}")[0].hardware
        ranks = config.most_ranks(config.compose([f"hardware={name}"]))
        assert ranks is not None
        assert hardware.memory_gib is not None
        for fact in (hardware.gpu, hardware.host_ram_gib, hardware.usd_per_device_h, hardware.watts_per_device):
            assert fact is not None
        assert (hardware.inter_node_gb_s is not None) == (hardware.nodes != "1")
        sizes[name] = ranks * hardware.memory_gib
    assert list(sizes.values()) == sorted(sizes.values())
