"""What the config refuses and how it says so; what a frozen config may be; the two hashes; the reference page."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import compose as composition
from train import config
from train.config import Config, ConfigError

ROOT = Path(config.__file__).resolve().parent.parent
FINGERPRINTS = {"data": "d" * 64, "model": "e" * 64}


def problems(*overrides: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.compose(overrides, **options)
    return caught.value.problems


@pytest.fixture(scope="module")
def cfg() -> Config:
    return config.compose([])


# ------------------------------------------------------------------------------------------------ overrides, one by one

WRONG = {
    # Names: the nearest, a namesake in another group, another project's word.
    "optim.lrr=1": "Did you mean optim.lr=1?",
    "optin.lr=1": "Did you mean optim.lr=1?",
    "lr=1": "Did you mean optim.lr=1?",
    "train.lr=1": "Did you mean optim.lr=1?",
    "trian.max_steps=5": "Did you mean train.max_steps=5?",
    "train.max_step=5": "Did you mean train.max_steps=5?",
    "train.Max_Steps=5": "Did you mean train.max_steps=5?",
    "max_epochs=5": "Did you mean train.max_epochs=5?",
    "data.seqlen=8": "Did you mean data.seq_len=8?",
    "model.heads=8": "Did you mean model.num_heads=8?",
    "model.hidden=8": "Did you mean model.hidden_size=8?",
    "hardware.gpus=8": "Here it is hardware.devices_per_node.",
    "strategy.microbatch_size=8": "Did you mean strategy.micro_batch_size=8?",
    "checkpoint.keep_bst=true": "Did you mean checkpoint.keep_best=true?",
    "run.nmae=x": "Did you mean run.name=x?",
    "evaluation.every=5": "Did you mean eval.every=5?",
    "learning_rate=1": "Here it is optim.lr.",
    "batch_size=8": "Here it is train.global_batch_size",
    "train.gradient_accumulation_steps=8": "follows from train.global_batch_size",
    "model.zzz.zzz=1": "docs/config.md",
    "+new.key=1": "there is no setting new.key",
    "++optim.lrr=1": "Did you mean optim.lr=1?",
    # Options of groups.
    "experiment=lm_stdlb": "Did you mean experiment=lm_stdlib?",
    "experiment=7b": "There are classify",
    "hardware=gpu8gb": "Did you mean hardware=gpu_8gb?",
    "strategy=fsdp": "Did you mean strategy=fsdp2?",
    "optim=adam": "Did you mean optim=adamw?",
    "tracker=[wandb,tensorbord]": "Did you mean tracker=tensorboard?",
    "tracker=[[wandb]]": "tracker takes the name of an option",
    "optim={lr: 1}": "optim takes the name of an option",
    "strategy=[ddp,single]": "strategy takes the name of an option",
    "run=x": "run is a group; set what is in it, such as run.name",
    # Kinds of value.
    "train.max_steps=ten": "must be a whole number, 1 or more, or null",
    "train.max_steps=1.5": "must be a whole number, 1 or more, or null",
    "train.max_steps=true": "must be a whole number, 1 or more, or null",
    "strategy.compile=1": "must be true or false",
    "optim.lr=fast": "must be a number, above 0, for example optim.lr=0.0003",
    "optim.lr=null": "must be a number, above 0",
    "optim.lr=nan": "must be a number, above 0",
    "optim.lr=inf": "must be a number, above 0",
    "optim.betas=0.9": "for example optim.betas=[0.9,0.95]",
    "optim.betas=[0.9]": "two of them",
    "data.augment=flip": "Did you mean data.augment=[flip]?",
    "data.augment=[flop]": "Did you mean data.augment=[flip]?",
    "data.sources=[{pth: a}]": "each {path: text, weight: a number, above 0}",
    "data.sources=[{weight: 1}]": "each {path: text, weight: a number, above 0}",
    "data.sources.0.path=a": "data.sources is set as a whole",
    "data.path=": "must be text",
    "train.precision=bf61": "Did you mean train.precision=bf16?",
    "task.class_weights=balance": "Did you mean task.class_weights=balanced?",
    # Ranges and forms.
    "train.global_batch_size=-3": "must be a whole number, 1 or more, for example train.global_batch_size=16",
    "train.global_batch_size=0": "must be a whole number, 1 or more",
    "optim.lr=-1": "above 0",
    "optim.ema=1": "between 0 and 1",
    "data.val_fraction=1": "from 0 to below 1",
    "seed=-1": "0 to 2^63 - 1",
    "train.max_tokens=1" + "0" * 400: "must be a number, above 0",
    "run.name=../x": "letters, digits and . _ -",
    "run.name=.x": "letters, digits and . _ -",
    "run.name=-x": "letters, digits and . _ -",
    "run.name=a..b": "letters, digits and . _ -",
    "run.name='a b'": "letters, digits and . _ -",
    "run.name='$(id)'": "letters, digits and . _ -",
    "run.max_time=soon": "such as 90, 15m, 1.5h, 2d or HH:MM:SS",
    "hardware.nodes=0": "such as 2 or 2-8",
    "hardware.nodes=8-2": "such as 2 or 2-8",
    "slurm.time=tomorrow": "such as 90 (minutes)",
    "slurm.extra=[rm]": "beginning with --",
    'slurm.account="a\nb"': "text on one line",
    "eval.metric=loss": "such as eval_loss",
    # Forms of an override.
    "foo": "written key=value",
    "optim.lr": "written key=value, as in optim.lr=0.0003",
    "optim": "written key=value, as in optim=adamw",
    "--optim.lr=1": "written key=value, without dashes",
    "data.path=/a=b": "needs quotes: data.path='\"/a=b\"'",
    "eval.prompt=f(x)": "needs quotes",
    "data.path=[": "cannot be read",
    "~data.val_path": "nothing can be taken away",
    "~tracker": "choose one of mlflow, none",
    "optim@model=adamw": "a group has one place",
    "optim.lr=1,2": "gearshift run -m optim.lr=1,2",
    "seed=range(1,3)": "gearshift run -m",
    "hydra.run.dir=x": "Hydra's own settings",
    "hydra/launcher=x": "Hydra's own settings",
    # Nothing from the environment, nothing that runs.
    "data.path=${oc.env:HOME}": "never comes from the environment",
    "seed=${now:%f}": "never comes from the environment",
    "slurm.setup=['${oc.env:HOME}']": "never comes from the environment",
    "optim.lr=${optim.lrr}": "there is no setting optim.lrr",
    "slurm.setup=['cd ${HOME}']": "For a literal ${ write \\${",
    "model._target_=os.system": "nothing in a config names code to run",
}


def test_each_wrong_override_is_named_with_what_to_type(cfg: Config) -> None:
    known, options = config.leaves(Config), config.find_options(config.CONF)
    told = {}
    for line in WRONG:
        asked = composition.read_overrides([line], known, options, several=["tracker"], synonyms=config.SYNONYMS)
        told[line] = asked.problems or problems(line)
    missed = {line: text for line, text in told.items() if len(text) != 1 or WRONG[line] not in text[0]}
    assert not missed
    shown = "\n".join(text for texts in told.values() for text in texts)
    assert not re.search(r"Config\b(?!\.)\w*\(|\w+Config\b|NoneType|Traceback|<class", shown), (
        "a Python name in a message"
    )


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=12) | st.sampled_from([line.partition("=")[0] for line in WRONG]),
    st.text(st.sampled_from("abc019.,:=+-~[]{}()'\"\\$ \n\t\0\xe9\u4e2d"), max_size=16),
)
def test_no_override_ends_in_a_traceback(key: str, value: str) -> None:
    asked = config.read_overrides([f"{key}={value}"], config.leaves(Config), config.find_options(config.CONF))
    assert len(asked.problems) + len(asked.values) + len(asked.choices) == 1
    assert all(text.isprintable() for text in asked.problems)


def test_all_problems_come_in_one_message() -> None:
    found = problems(*WRONG, "numerics=exact", "strategy.compile=true")
    assert not [line for line in WRONG if not any(WRONG[line] in text for text in found)]
    assert any(
        "need strategy.compile=false" in text for text in found
    )  # rules between settings are checked all the same


@pytest.mark.pulse
def test_a_wrong_command_costs_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "train"]
    lines = ["optim.lrr=1", "train.global_batch_size=-3", "experiment=lm_stdlb"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command[:1], *command[3:], *lines], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for wanted in ("optim.lr=1?", "train.global_batch_size=16", "experiment=lm_stdlib?"):
        assert done.stderr.count(wanted) == 1
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < 1.0, f"{cpu_s:.2f} s of processor time"
    traced = subprocess.run([*command, *lines], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert not re.search(r"\| +(torch|transformers|numpy|accelerate)\b", traced.stderr)


def test_values_are_taken_as_the_setting_means_them(cfg: Config) -> None:
    composed = config.compose(
        [
            "run.name=007", "hardware.nodes=2-8", "slurm.time=30", "run.max_time=90", "train.max_steps=1e2",
            "optim.lr=1",
            "optim.clip=null", "data.augment=[]", "eval.prompt='def f(x):  # \"a\", \\${b'",
            "slurm.setup=['cd \\${HOME}']",
            "optim.eps=${optim.weight_decay}", "slurm.extra=[--exclusive]", "seed=1", "seed=2",
        ]
    )  # fmt: skip
    assert (composed.run.name, composed.hardware.nodes, composed.slurm.time) == ("007", "2-8", "30")
    assert composed.run.max_time == "90"
    assert (composed.train.max_steps, composed.optim.lr, composed.optim.clip) == (100, 1.0, None)
    assert type(composed.train.max_steps) is int
    assert type(composed.optim.lr) is float
    assert composed.slurm.setup == ["cd ${HOME}"]
    assert composed.optim.eps == cfg.optim.weight_decay
    assert composed.seed == 2


def test_an_override_of_one_alternative_clears_the_other(cfg: Config) -> None:
    assert cfg.train.max_steps is not None
    epochs = config.compose(["train.max_epochs=2"]).train
    assert (epochs.max_steps, epochs.max_epochs, epochs.max_tokens) == (None, 2.0, None)
    assert config.compose(["train.max_steps=null", "train.max_tokens=1e6"]).train.max_tokens == 1e6
    sources = config.compose(["data.sources=[{path: a, weight: 2}, {path: b}]"]).data
    assert sources.path is None
    assert [(s.path, s.weight) for s in sources.sources] == [("a", 2.0), ("b", 1.0)]
    assert "only one of" in problems("train.max_steps=3", "train.max_epochs=2")[0]
    assert "only one of" in problems("data.path=a", "data.sources=[{path: b}]")[0]
    assert "has no duration" in problems("train.max_steps=null")[0]


@pytest.mark.parametrize(
    ("choice", "on"),
    [("[wandb,tensorboard]", {"wandb", "tensorboard"}), ("none", set()), ("mlflow", {"mlflow"}), ("wandb", {"wandb"})],
)
def test_trackers_are_chosen_one_or_several(choice: str, on: set[str]) -> None:
    tracker = config.compose([f"tracker={choice}"]).tracker
    assert {name for name in ("wandb", "mlflow", "tensorboard") if getattr(tracker, name)} == on


# ----------------------------------------------------------------------------------------------- rules between settings

TOGETHER = {
    "numerics=exact strategy=zero2": "set strategy=ddp or numerics=fast",
    "numerics=exact train.precision=fp16": "need train.precision=fp32 or bf16",
    "numerics=exact strategy.compile=true": "need strategy.compile=false",
    "numerics=exact strategy.fused_optimizer=true": "need strategy.fused_optimizer=null",
    "train.precision=fp16 hardware=cpu": "a CPU does not train in fp16",
    "train.precision=fp16 hardware=gpu_8gb": "needs a loss scale",
    "strategy=ddp strategy.offload=cpu": "needs strategy=zero2 or zero3, not ddp",
    "strategy=zero1 strategy.offload=cpu": "needs strategy=zero2 or zero3, not zero1",
    "strategy=zero2 strategy.offload=nvme hardware.nvme_path=/n": "DeepSpeed offloads to the CPU instead",
    "strategy=zero3 strategy.offload=nvme": "set hardware.nvme_path",
    "strategy=zero2 strategy.offload=cpu optim=sgd": "set optim=adamw",
    "strategy=zero2 strategy.offload=cpu strategy.offload_parameters=true": "needs strategy=zero3",
    "strategy.activation_offload=true strategy.compile=true": "set strategy.compile=false",
    "strategy=fsdp2 optim=adamw_8bit": "set strategy=ddp, or optim=adamw",
    "strategy=zero3 peft=qlora model.path=m": "set strategy=fsdp2 or peft=lora",
    "peft=lora": "set model.path, or peft=none",
    "model=pretrained": "set model.path",
    "data.fold=5": "must be below data.folds=5",
    "model.hidden_size=100 model.num_heads=3": "must be a multiple of model.num_heads=3",
    "model.hidden_size=12 model.num_heads=4": "even number per head",
    "model.num_kv_heads=3": "must divide model.num_heads=4",
    "model=gpt2 model.num_kv_heads=2": "only model=llama groups its heads",
    "model.max_position_embeddings=64": "must be at most model.max_position_embeddings=64",
    "model.vocab_size=512": "at least data.tokenizer_vocab_size=1024",
    "hardware=node_4x24gb strategy=single": "set strategy=ddp, or hardware.nodes=1",
    "strategy.micro_batch_size=17": "at most train.global_batch_size=16",
    "eval.patience=3 eval.every=null": "set eval.every",
    "task=segment": "set model=unet or model=pretrained",
    "data=images": "set data=text or data=chat",
    "data.augment=[flip]": "is for images",
    "task.class_weights=balanced": "tokens have no class weights",
    "task.name=caption": "must be one of causal_lm, classify, segment",
    "model.name=lama": "Did you mean model.name=llama?",
    "experiment=segment task.class_weights=[1,2] data.num_classes=3": "one for each of data.num_classes=3",
    "experiment=segment train.max_tokens=1e6": "images have no tokens",
    "experiment=segment strategy.chunked_loss=true": "is for vocabularies",
    "experiment=classify model=vit model.patch_size=5": "must divide data.image_size",
}  # fmt: skip


@pytest.mark.parametrize("line", TOGETHER)
def test_each_wrong_pair_is_named_with_what_to_type(line: str) -> None:
    found = problems(*line.split(" ", line.count("=") - 1))
    assert any(TOGETHER[line] in text for text in found), found


def test_right_pairs_pass() -> None:
    for line in (
        "numerics=exact strategy=ddp train.precision=bf16",
        "strategy=zero3 strategy.offload=nvme hardware.nvme_path=/n strategy.offload_parameters=true",
        "strategy=zero2 strategy.offload=cpu",
        "strategy=ddp optim=adamw_8bit",
        "experiment=finetune_qlora strategy=fsdp2",
        "hardware.nodes=2-4 hardware.devices_per_node=4",
        "data.fold=4 data.folds=5",
        "model.path=runs/x peft=lora model.hidden_size=7",
    ):
        config.compose(line.split())


def test_only_data_of_ones_own_is_missing_before_a_run(cfg: Config) -> None:
    assert config.missing_inputs(cfg) == []
    assert "set data.path=PATH" in config.missing_inputs(config.compose(["experiment=segment"]))[0]
    assert config.missing_inputs(config.compose(["experiment=segment", "data.path=x"])) == []
    assert config.missing_inputs(config.compose(["experiment=segment_digits"])) == []


def test_times_and_nodes() -> None:
    assert [config.seconds(t) for t in ("90", "15m", "1.5h", "2d", "01:02:03", "1-00:00:01")] == [
        90.0, 900.0, 5400.0, 172800.0, 3723.0, 86401.0,
    ]  # fmt: skip
    assert config.node_range("2-8") == (2, 8)
    assert config.most_ranks(config.compose(["hardware.nodes=2-3", "hardware.devices_per_node=4"])) == 12
    assert config.most_ranks(config.compose([])) is None


# ------------------------------------------------------------------------------------------------------ a frozen config


def test_a_frozen_config_reads_back_equal(tmp_path: Path, cfg: Config) -> None:
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    assert config.load(tmp_path) == cfg == config.load(tmp_path / "config.yaml")
    assert "{" not in config.to_yaml(cfg)  # block style


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t${}:#'\"\\"), min_size=1),
    number=st.floats(min_value=1e-300, max_value=1e300),
)
def test_any_text_and_number_survives_freezing(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float
) -> None:
    base = Config(train=config.TrainConfig(max_steps=1))
    frozen = replace(base, eval=replace(base.eval, prompt=text), optim=replace(base.optim, lr=number))
    path = tmp_path_factory.mktemp("frozen") / "config.yaml"
    path.write_text(config.to_yaml(frozen))
    assert config.load(path) == frozen


@pytest.mark.parametrize("text", ["null", "1e3", "no", "1:30", "007", "2001-01-01", "~", "${x}", "\\${x}", "=", "<<"])
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, cfg: Config, text: str) -> None:
    frozen = replace(cfg, slurm=replace(cfg.slurm, setup=[text]))
    (tmp_path / "config.yaml").write_text(config.to_yaml(frozen))
    assert config.load(tmp_path).slurm.setup == [text]
    assert config.load(tmp_path, ["seed=5", "optim.lr=${optim.eps}"]).slurm.setup == [text]


def test_a_frozen_config_takes_settings_and_where_and_how(tmp_path: Path, cfg: Config) -> None:
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    moved = config.load(tmp_path, ["hardware=node_4x24gb", "strategy=zero2", "train.max_epochs=3", "tracker=none"])
    assert (moved.hardware.devices_per_node, moved.strategy.name) == (4, "zero2")
    assert (moved.train.max_steps, moved.train.max_epochs) == (None, 3.0)
    assert not moved.tracker.wandb
    assert (moved.model, moved.data, moved.optim) == (cfg.model, cfg.data, cfg.optim)
    with pytest.raises(ConfigError, match="a run keeps the experiment it began with"):
        config.load(tmp_path, ["experiment=segment"])
    with pytest.raises(ConfigError, match="a run keeps the model it began with"):
        config.load(tmp_path, ["model=gpt2", "seed=2"])


HOSTILE = {
    "optim:\n  _target_: os.system\n": "nothing in a config names code to run",
    "_target_: os.system\n": "nothing in a config names code to run",
    "seed: !!python/object/apply:os.system [id]\n": "tags are not used",
    "seed: !!int 3\n": "tags are not used",
    "a: &a [x, x]\nb: [*a, *a]\n": "anchors, aliases and tags are not used",
    "seed: 1\nseed: 2\n": "a key is there twice",
    "optim:\n  lrr: 1\n": "Did you mean optim.lr?",
    "optim: 3\n": "optim is a group of settings",
    "optim:\n  lr: [1\n": "cannot be read as a config",
    "- seed\n": "must hold",
    "[" * 100_000: "cannot be read as a config",
    "experiment: ../../etc\n": "letters, digits",
    "run:\n  name: ../x\n": "letters, digits",
    "optim:\n  lr: .nan\n": "above 0",
    "optim:\n  1: 2\n": "there is no setting optim.1",
    "? [a, b]\n: 3\n": "cannot be read as a config",
    "seed: 2001-01-01\n": "must be a whole number",
    "data:\n  path: x\x00y\n": "cannot be read as a config",
    "x: " + "y" * 200_001: "larger than 200000 bytes",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_or_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(HOSTILE[text])) as caught:
        config.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_frozen_config_says_everything_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim:\n  lrr: 1\ntrain:\n  max_steps: -1\n")
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path, ["seed=x"])
    assert len(caught.value.problems) == 4  # those three, and no duration left
    (tmp_path / "config.yaml").write_text("optim: 3\ntrain: [x]\n")
    with pytest.raises(ConfigError, match="optim is a group of settings"):
        config.load(tmp_path, ["optim.lr=1", "train.max_steps=1"])
    with pytest.raises(ConfigError, match=re.escape("No such file or directory")):
        config.load(tmp_path / "nothing")


# -------------------------------------------------------------------------------------------------------------- hashes


def changed(value: Any, hint: Any) -> Any:
    """Another value of the same setting."""
    literals = composition._names(hint)
    if literals and not isinstance(value, list):
        return next(name for name in literals if name != value)
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case str():
            return value + "x"
        case [float(), *_]:
            return [0.5, *value[1:]]
        case []:
            return literals[:1] or ([config.SourceConfig("s")] if "Source" in str(hint) else ["--x"])
    text = composition.words(hint)
    return 3 if "whole number" in text else 0.5 if "number" in text else True if "true" in text else "x"


def with_leaf(cfg: Config, key: str, value: Any) -> Config:
    group, _, name = key.rpartition(".")
    return replace(cfg, **({group: replace(getattr(cfg, group), **{name: value})} if group else {name: value}))


def hashes_that_move(cfg: Config) -> tuple[set[str], set[str]]:
    """Settings whose change moves the math hash, and those that move the exec hash."""
    math, execution = config.math_hash(cfg, FINGERPRINTS), config.exec_hash(cfg)
    settings_, moved, elsewhere = config.to_dict(cfg), set(), set()
    for key, leaf in config.leaves(Config).items():
        value = settings_
        for name in key.split("."):
            value = value[name]
        other = with_leaf(cfg, key, changed(value, leaf.hint))
        assert other != cfg, key
        moved |= {key} if config.math_hash(other, FINGERPRINTS) != math else set()
        elsewhere |= {key} if config.exec_hash(other) != execution else set()
    return moved, elsewhere


def test_the_math_hash_moves_with_what_is_learned_and_nothing_else(cfg: Config) -> None:
    what = {key for key in config.leaves(Config) if key.split(".")[0] in config.WHAT}
    where_and_how = {key for key in config.leaves(Config) if key.split(".")[0] in (*config.WHERE, *config.HOW)}
    by_content = {"data.path", "data.val_path", "data.chat_template", "data.tokenizer", "data.cache_dir",
                  "data.workers", "model.path", "model.revision", "model.gguf_file"}  # fmt: skip
    moved, elsewhere = hashes_that_move(cfg)
    assert moved == (what - by_content) | {"data.tokenizer"}  # `bpe` to another word
    assert elsewhere == where_and_how - {"hardware.nvme_path"}


def test_content_stands_for_paths(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(fingerprints: dict[str, str] = FINGERPRINTS, **data: Any) -> str:
        return config.math_hash(replace(cfg, data=replace(cfg.data, **data)), fingerprints)

    here = [config.SourceConfig("/here/a", 2.0), config.SourceConfig("/here/b", 1.0)]
    there = [config.SourceConfig("/there/a", 2.0), config.SourceConfig("/there/b", 1.0)]
    heavier = [config.SourceConfig("/here/a", 3.0), config.SourceConfig("/here/b", 1.0)]
    assert hashed(sources=here) == hashed(sources=there) != hashed(sources=heavier)
    assert hashed(tokenizer="/a/tokenizer") == hashed(tokenizer="someone/tokenizer") != hashed(tokenizer="bytes")
    assert hashed({**FINGERPRINTS, "data": "f" * 64}) != hashed()
    with pytest.raises(ValueError, match="'data'"):
        hashed({})
    with pytest.raises(ValueError, match="'model'"):
        config.math_hash(replace(cfg, model=replace(cfg.model, path="m")), {"data": "d"})
    monkeypatch.setattr(config, "UNHASHED", set())  # the control: were paths hashed, this test would see it
    assert hashed(sources=here) != hashed(sources=there)


def test_differences_are_told_as_overrides(cfg: Config) -> None:
    other = config.compose(["train.max_steps=7", "data.sources=[{path: a}]", "optim.clip=null"])
    told = config.diff(config.math_dict(cfg, FINGERPRINTS), config.math_dict(other, {**FINGERPRINTS, "data": "f"}))
    assert "train.max_steps: 300 -> 7" in told or any(
        t.startswith("train.max_steps: ") and t.endswith("-> 7") for t in told
    )
    assert "optim.clip: 1.0 -> null" in told
    assert "data.sources[0].weight: (absent) -> 1.0" in told
    assert config.diff(config.to_dict(cfg), config.to_dict(cfg)) == []


# ---------------------------------------------------------------------------- local settings, more groups, plug-ins


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `conf/` without this machine's own file."""
    for path in [config.CONF / "config.yaml", *config.CONF.glob("*/*.yaml")]:
        if path != config.LOCAL:
            copy = tmp_path / "conf" / path.relative_to(config.CONF)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    monkeypatch.setattr(config, "LOCAL", tmp_path / "conf" / "local" / "default.yaml")
    config.LOCAL.parent.mkdir()
    return tmp_path / "conf"


def test_a_machines_own_settings_hold_and_touch_nothing_that_is_learned(conf: Path) -> None:
    config.LOCAL.write_text(
        "defaults:\n  - override /tracker: none\nrun:\n  root: /scratch/runs\ndata:\n  cache_dir: /scratch/cache\n"
        "slurm:\n  account: abc\nhardware:\n  usd_per_device_h: 9\n"
    )
    mine = config.compose(["hardware=gpu_24gb"])
    assert (mine.run.root, mine.data.cache_dir, mine.slurm.account) == ("/scratch/runs", "/scratch/cache", "abc")
    assert (mine.hardware.usd_per_device_h, mine.hardware.memory_gib, mine.tracker.wandb) == (9.0, 24.0, False)
    assert config.compose(["run.root=here"]).run.root == "here"
    config.LOCAL.write_text("defaults:\n  - override /model: gpt2\noptim:\n  lr: 1\nrun:\n  rot: x\n")
    told = problems()
    assert sum("says what this machine is" in text for text in told) == 2
    assert any("set optim.lr elsewhere" in text for text in told)
    assert any("Did you mean run.root?" in text and str(config.LOCAL) in text for text in told)


def test_more_groups_from_a_directory(conf: Path, tmp_path: Path) -> None:
    more = tmp_path / "it's more"
    (more / "experiment").mkdir(parents=True)
    (more / "site").mkdir()
    (more / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - lm_stdlib\n  - _self_\noptim:\n  lr: 0.5\n"
    )
    (more / "site" / "here.yaml").write_text("# @package _global_\nslurm:\n  partition: big\n")
    mine = config.compose(["experiment=mine", "site=here", "seed=3"], config_dir=str(more))
    assert (mine.experiment, mine.optim.lr, mine.slurm.partition) == ("mine", 0.5, "big")
    assert mine.model == config.compose([]).model
    assert "Did you mean experiment=mine?" in problems("experiment=mime", config_dir=str(more))[0]
    assert "must be a directory" in problems(config_dir=str(more / "nothing"))[0]
    (more / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nstrategy:\n  micro_batch_size: 4\noptim:\n  lr: x\n"
    )
    told = problems("experiment=mine", "train.max_steps=1", config_dir=str(more))
    assert any("says what is learned" in text for text in told)
    assert any(text.startswith("optim.lr=x") and "mine.yaml" in text for text in told)
    (more / "experiment" / "mine.yaml").write_text("a: [\n")
    told = problems("experiment=mine", "seed=x", config_dir=str(more))
    assert "seed=x" in told[0]
    assert "do not compose" in told[1]
    (more / "experiment" / "mine.yaml").write_text("# @package _global_\n'a.b': '${seed}'\noptim: ${nothing}\n")
    told = problems("experiment=mine", "optim.lr=1", config_dir=str(more))
    assert any("there is no setting a.b" in text for text in told)


def test_a_plug_in_counts_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cfg: Config) -> None:
    before = config.math_hash(cfg, FINGERPRINTS)
    try:
        hashes = []
        for place, body in (("a", "x = 1\n"), ("b", "x = 1\n"), ("c", "x = 2\n")):
            package = tmp_path / place / "gearshift_test_plugin"
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("from . import model\n")
            (package / "model.py").write_text(body)
            monkeypatch.syspath_prepend(str(tmp_path / place))
            for name in [name for name in sys.modules if name.startswith("gearshift_test_plugin")]:
                del sys.modules[name]
            composed = config.compose(["model.name=mine"], plugin="gearshift_test_plugin")
            hashes.append(config.math_hash(composed, FINGERPRINTS))
        assert hashes[0] == hashes[1] != hashes[2]
        assert config.math_hash(cfg, FINGERPRINTS) != before
    finally:
        composition.PLUGINS.clear()
    (tmp_path / "gearshift_broken_plugin.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, told in (
        ("gearshift_no_such_plugin", "is neither installed nor in"),
        ("gearshift_broken_plugin", "RuntimeError: no"),
        ("../x", "must be the name of a module"),
        ("os; import x", "must be the name of a module"),
    ):
        assert told in problems(plugin=name)[0]
    assert not composition.PLUGINS


# ------------------------------------------------------------------------------------------------------------ reference


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == config.reference(), "run: python -m train.config > docs/config.md"
    assert all(f"| `{key}` |" in page for key in config.leaves(Config))


def settings_read_in(source: str) -> set[str]:
    """`group.field` for each use of a setting in Python source: `cfg.optim.lr`, and `o.lr` after `o = cfg.optim`.

    `getattr(cfg.tracker, name)` uses the fields of the group that stand as text in the same source.
    """
    groups = {key.partition(".")[0] for key in config.leaves(Config) if "." in key}
    classes = {type(getattr(Config(), group)).__name__: group for group in groups}
    nodes = list(ast.walk(ast.parse(source)))
    names = {group: {group} for group in groups}

    def group_of(node: ast.expr) -> set[str]:
        """The groups that an expression may stand for."""
        return names.get(node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", ""), set())

    def bind(target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for left, right in zip(target.elts, value.elts):
                bind(left, right)
        elif isinstance(target, ast.Name | ast.Attribute) and isinstance(value, ast.Name | ast.Attribute):
            name = target.id if isinstance(target, ast.Name) else target.attr
            names[name] = names.get(name, set()) | group_of(value)

    for node in nodes:
        if isinstance(node, ast.arg) and node.annotation is not None:
            words = re.findall(r"\w+", ast.unparse(node.annotation))
            names[node.arg] = names.get(node.arg, set()) | {classes[word] for word in words if word in classes}
        for target in node.targets if isinstance(node, ast.Assign) else []:
            bind(target, node.value)
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    read = set()
    for node in nodes:
        if isinstance(node, ast.Attribute):
            read |= {node.attr, *(f"{group}.{node.attr}" for group in group_of(node.value))}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            read |= {f"{group}.{text}" for group in group_of(node.args[0]) for text in texts}
    return read & set(config.leaves(Config))


def test_every_setting_is_read_by_something() -> None:
    read: set[str] = set()
    for path in [*(ROOT / "train").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        if path.name not in ("config.py", "compose.py"):
            read |= settings_read_in(path.read_text())
    unread = set(config.leaves(Config)) - read
    assert not unread, f"nothing reads {sorted(unread)}"


def test_the_search_for_readers_finds_and_misses() -> None:
    source = """
def f(cfg, d: DataConfig):
    o, self.s = cfg.optim, cfg.strategy
    return o.lr, self.s.compile, d.fold, cfg.run.name, x.eps, getattr(cfg.tracker, name), "wandb"
"""
    assert settings_read_in(source) == {"optim.lr", "strategy.compile", "data.fold", "run.name", "tracker.wandb"}
