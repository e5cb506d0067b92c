"""Models that start from weights: where those lie, how they are read, and how a few parameters are trained beside them.

Owns: `build` (a model that knows where the values of its parameters are: a Hugging Face directory or hub id, a GGUF
file, a run directory), `adapt` (LoRA, and QLoRA over a 4-bit base), `locate` (the directory behind `model.path`).

Does not own: networks from scratch (`lm.py`, `vision.py`), values that no checkpoint brings (`models/__init__.py`),
tokenizers and templates (`train/data`), the format of our own checkpoints (`train/checkpoint.py`).

Safetensors (and GGUF, which is data too) are the only files read: nothing that comes with a model can execute. Tensors
are read one at a time, when a strategy asks for them, so no rank holds the whole model; only a checkpoint whose names
or numbers transformers must convert is loaded whole. Every tensor that does not match is named.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train import models
from train.models import ModelError

if TYPE_CHECKING:
    from train.config import Config

log = logging.getLogger(__name__)

AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "classify": "AutoModelForImageClassification",
    "segment": "AutoModelForSemanticSegmentation",
}
"""Task -> transformers' class for it; other tasks get `AutoModel`."""

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Weights:
    """Named tensors, read when they are asked for."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """Name -> the whole tensor on the CPU, in the dtype it is stored in."""


def build(cfg: Config, info: Mapping[str, Any]) -> Any:
    """The model of `model.path`: parameters fp32 on meta, with `starting_weights` saying what each is filled from.

    A head that the checkpoint lacks, or has in another size, is listed in `model.fresh` and starts from scratch (a
    language model's may not). Raises ModelError for everything else that is missing.
    """
    model, weights = _open(cfg, info)
    _check_language_model(model, cfg, info)
    model.fresh = {name for name, _ in model.named_parameters()} - set(weights.shapes)
    model.starting_weights = lambda name: weights.read(name).float() if name in weights.shapes else None
    model.idle = []
    if cfg.task.name in ("classify", "segment"):
        from train.models import vision

        model.idle = vision.idle(model, info["channels"], cfg.data.image_size)
        for name in model.idle:
            model.get_parameter(name).requires_grad_(False)
            model.fresh.discard(name)
            log.warning("stays as it is, because no logit depends on it: %s", name)
    return model


def adapt(model: Any, cfg: Config) -> Any:
    """LoRA over `model`, a peft model: adapters (and a fresh head) are trained in fp32, nothing else is.

    Frozen parameters are stored in the run's precision, for QLoRA the matrices in 4 bits (NF4, double quantisation) in
    `peft.quant_storage`, except those that `peft.quant_exclude` names. `lm_head` gets no adapter. Raises ModelError for
    target modules and exceptions that the model does not have.
    """
    import peft

    source, fresh, config = model.starting_weights, model.fresh, cfg.peft
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in fresh)
        if name not in fresh:
            parameter.data = parameter.data.to(_frozen_dtype(cfg))
    _keep_whole(model, config.quant_exclude)
    if config.name == "qlora":
        _quantise(model, cfg)
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    try:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,  # type: ignore[arg-type]  # it divides by r, nothing else
                lora_dropout=config.dropout,
                target_modules=targets,
                exclude_modules=sorted({name.rpartition(".")[0] for name in (*fresh, *model.idle)}) or None,
                task_type="CAUSAL_LM" if cfg.task.name == "causal_lm" else None,
            ),
        )
    except ValueError as error:
        layers = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        known = ", ".join(sorted(layers)) or "none"
        raise ModelError(f"peft.target_modules={targets}: {error} Linear layers of this model: {known}.") from error
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".lora_" in name or plain_name(name) in fresh)
    adapted.starting_weights = lambda name: source(plain_name(name))  # type: ignore[assignment]
    return adapted


def plain_name(name: str) -> str:
    """The name that a parameter of an adapted model has in the model itself."""
    return name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")


# ---- Where weights are -----------------------------------------------------------------------------------------------


def locate(cfg: Config) -> Path:
    """The directory of `model.path`, fetched from the hub (into its own cache) where it is a hub id.

    Raises ModelError for a path that does not exist, data.DataError for what the hub does not give.
    """
    assert cfg.model.path is not None
    directory = Path(cfg.model.path).expanduser()
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    from train.data import cache, hub

    name, revision = hub.parse(cfg.model.path) or (None, None)
    if name is None:
        raise ModelError(f"model.path={cfg.model.path}: there is no such directory.")
    commit = hub.commit("model", name, revision or cfg.model.revision, cache.cache_root(cfg), log.info)
    try:
        # The index first, then what it lists: a repository may hold the same weights again, under other names.
        directory = Path(snapshot_download(name, revision=commit, allow_patterns="*.json", ignore_patterns="*/*"))
        weights = [cfg.model.gguf_file] if cfg.model.gguf_file else [file.name for file in _files(directory)]
        return Path(snapshot_download(name, revision=commit, allow_patterns=weights))
    except ModelError:
        raise
    except Exception as error:
        raise hub.explain(error, "model", name, commit) from None


def _open(cfg: Config, info: Mapping[str, Any]) -> tuple[Any, Weights]:
    """The model behind `cfg.model.path`, on meta, and its weights by the model's own names."""
    directory = locate(cfg)
    if (directory / "checkpoints").is_dir():
        return _open_run(directory, cfg, info)
    model = _from_config(directory, cfg, info)
    if cfg.model.gguf_file is not None:
        weights = _by_transformers(directory, model.config, cfg)
    else:
        weights = _safetensors(directory)
        if set(_wanted(model)) - set(_paired(model, weights)):
            weights = _by_transformers(directory, model.config, cfg)  # its names may be of an older generation
    return model, _matched(model, weights, cfg)


def _open_run(directory: Path, cfg: Config, info: Mapping[str, Any]) -> tuple[nn.Module, Weights]:
    """A run of ours: its masters, over the weights that it started from itself where it trained only some of them."""
    from train import checkpoint, config

    run = config.load(directory)
    masters = {plain_name(name): tensor for name, tensor in checkpoint.read_masters(directory).items()}
    if run.model.path is not None:
        model, base = _open(replace(run, task=cfg.task, data=cfg.data), info)
    else:
        rows = [t.shape[0] for n, t in masters.items() if n.endswith(("embed_tokens.weight", "wte.weight"))]
        run.model.dropout = cfg.model.dropout
        with models.parameters_on_meta():
            model = models.MODELS[run.model.name](run, {**info, **({"vocab_size": rows[0]} if rows else {})})
        base = Weights({}, masters.__getitem__)
    adapters = {name.partition(".lora_")[0] for name in masters if ".lora_" in name}
    transposed = {name for name, layer in model.named_modules() if _transposed(layer)}
    scale = run.peft.alpha / run.peft.r

    def read(name: str) -> Tensor:
        if name in masters:
            return masters[name]
        weight, layer = base.read(name).float(), name.removesuffix(".weight")
        if layer in adapters:
            delta = masters[f"{layer}.lora_B.default.weight"] @ masters[f"{layer}.lora_A.default.weight"]
            weight = weight + scale * (delta.T if layer in transposed else delta)  # what was read may be read again
        return weight

    trained = {name: tuple(tensor.shape) for name, tensor in masters.items() if ".lora_" not in name}
    return model, _matched(model, Weights({**base.shapes, **trained}, read), cfg)


def _from_config(directory: Path, cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    """The architecture that the directory's config names, on meta."""
    import transformers

    if (directory / "adapter_config.json").exists():
        raise ModelError(f"model.path={cfg.model.path} holds adapters only. Merge them into their base model first.")
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, gguf_file=cfg.model.gguf_file, trust_remote_code=False, local_files_only=True
        )
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(
                f"model.path={cfg.model.path} is stored quantised. Give it in full precision: peft=qlora quantises it."
            )
        if cfg.task.name in ("classify", "segment") and config.num_labels != info["num_classes"]:
            config.num_labels = info["num_classes"]
        if getattr(config, "use_auxiliary_head", False):
            config.use_auxiliary_head = False  # a second answer, which only a loss of its own would train
        auto = getattr(transformers, AUTO.get(cfg.task.name, "AutoModel"))
        if type(config) not in auto._model_mapping:
            kinds = ", ".join(sorted({kind.model_type for kind in auto._model_mapping}))
            raise ModelError(
                f"model.path={cfg.model.path}: a {config.model_type} cannot be had for task={cfg.task.name}. "
                f"Kinds that can: {kinds}."
            )
        with models.parameters_on_meta():
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:  # transformers' ways to say no; its text says why
        raise ModelError(f"model.path={cfg.model.path}: transformers cannot build it: {error}") from error
    if cfg.task.name in ("classify", "segment"):
        from train.models import vision

        model = vision.stand_alone(model)
    return model


def _check_language_model(model: Any, cfg: Config, info: Mapping[str, Any]) -> None:
    if cfg.task.name != "causal_lm":
        return
    rows, config = model.get_input_embeddings().weight.shape[0], model.config
    if info["vocab_size"] > rows:
        raise ModelError(
            f"The tokenizer has {info['vocab_size']} entries, the model {rows}. data.tokenizer=bpe is the model's own."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and cfg.data.seq_len > longest:
        raise ModelError(
            f"data.seq_len={cfg.data.seq_len}: this model sees {longest} tokens at most. Lower data.seq_len."
        )
    if cfg.data.kind == "chat":
        _check_packing(model, cfg)


def _check_packing(model: Any, cfg: Config) -> None:
    """Packed chats are kept apart by a mask of attention and by positions, so nothing else may join tokens."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    recurrent = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv1d | nn.RNNBase)]
    if getattr(model, "_is_stateful", False) or recurrent or not {"attention_mask", "position_ids"} <= set(parameters):
        raise ModelError(
            f"model.path={cfg.model.path}: {type(model).__name__} carries a state along the row or takes no positions, "
            "so chats that are packed into one row would see each other. Give a model whose tokens meet in attention "
            "alone, or train on data=text."
        )
    for field in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, field, None)
        if window is not None and cfg.data.seq_len > window:
            raise ModelError(
                f"data.seq_len={cfg.data.seq_len}: this model attends over windows of {window} tokens, which packed "
                f"chats do not support. Set data.seq_len={window} or less."
            )


# ---- Reading ---------------------------------------------------------------------------------------------------------


def _safetensors(directory: Path) -> Weights:
    """The tensors of a Hugging Face directory, sharded or not."""
    from safetensors import safe_open

    files = _files(directory)
    if files == [directory / _SINGLE] and not files[0].exists():
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:10])
        raise ModelError(
            f"{directory} has no {_SINGLE} (it has: {there}). Weights are read from safetensors only, because "
            "other formats can execute code. Convert them, or name a GGUF file with model.gguf_file."
        )
    handles, shapes = {}, {}
    for file in files:
        if not file.exists():
            raise ModelError(f"{file} is missing, but {_INDEX} lists it. Fetch the model again.")
        handle = safe_open(file, framework="pt")
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
            handles[name], shapes[name] = handle, tuple(handle.get_slice(name).get_shape())
    return Weights(shapes, lambda name: handles[name].get_tensor(name))


def _files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights: those of its index, else the only one; they need not be there."""
    index = directory / _INDEX
    if not index.exists():
        return [directory / _SINGLE]
    try:
        return sorted({directory / Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights ({error}). Fetch the model again.") from None


def _by_transformers(directory: Path, config: Any, cfg: Config) -> Weights:
    """The same through transformers' own loader, whole: it dequantises GGUF and renames what older versions saved."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        with models.parameters_in_memory():
            model, found = getattr(transformers, AUTO.get(cfg.task.name, "AutoModel")).from_pretrained(
                directory,
                config=config,
                gguf_file=cfg.model.gguf_file,
                dtype=torch.float32,
                use_safetensors=True,
                weights_only=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, OSError, ImportError) as error:
        raise ModelError(f"model.path={cfg.model.path}: transformers cannot read it: {error}") from error
    invented = set(found["missing_keys"]) | {key[0] for key in found["mismatched_keys"]}
    tensors = {name: t.detach() for name, t in model.state_dict().items() if name not in invented}
    return Weights({name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__)


def _wanted(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter and persistent buffer -> all its names (more than one where it is tied)."""
    names: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def _spellings(model: nn.Module, name: str) -> tuple[str, ...]:
    """A base model's checkpoint lacks the prefix that its parameters have under a head, or the reverse."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return name, name.removeprefix(prefix), prefix + name


def _paired(model: nn.Module, weights: Weights) -> dict[str, str]:
    """Name in the model -> name in the checkpoint."""
    pairs = {}
    for first, names in _wanted(model).items():
        found = [key for name in names for key in _spellings(model, name) if key in weights.shapes]
        if found:
            pairs[first] = found[0]
    return pairs


def _matched(model: nn.Module, weights: Weights, cfg: Config) -> Weights:
    """`weights` under the model's names; says what does not match, fills buffers. Raises ModelError (see `build`)."""
    tensors = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    pairs = _paired(model, weights)
    missing = [name for name in _wanted(model) if name not in pairs]
    other = [name for name, key in pairs.items() if weights.shapes[key] != shapes[name]]
    said = [f"{name}: not in the checkpoint" for name in missing]
    said += [f"{n}: {list(weights.shapes[pairs[n]])} in the checkpoint, {list(shapes[n])} in the model" for n in other]
    whole = cfg.task.name == "causal_lm"
    if (whole and said) or any(name.startswith(f"{getattr(model, 'base_model_prefix', '')}.") for name in missing):
        raise ModelError(
            f"model.path={cfg.model.path}: the weights are not those of the model.\n  " + "\n  ".join(said)
        )
    for line in said:
        log.warning("starts from scratch: %s", line)

    known = {key for name in shapes for key in _spellings(model, name)}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unused = [n for n in sorted(weights.shapes) if n not in known and not any(re.search(i, n) for i in ignored)]
    if unused:
        log.warning("not used from the checkpoint: %s", ", ".join(unused))

    pairs = {name: key for name, key in pairs.items() if name not in other}
    for name, buffer in model.named_buffers():
        if name in pairs:
            buffer.copy_(weights.read(pairs[name]))
    return Weights({name: shapes[name] for name in pairs}, lambda name: weights.read(pairs[name]))


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def _keep_whole(model: Any, parts: list[str]) -> None:
    """Mark the linear layers with one of `parts` in their dotted name; the planner looks at the mark too.

    Small models lose much in 4 bits, and most of it in few layers; Dettmers and Zettlemoyer (arXiv:2212.09720) give curves.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) or _transposed(layer)
    }
    for part in parts:
        named = [layer for name, layer in layers.items() if part in name.split(".")]
        if not named:
            known = ", ".join(sorted({word for name in layers for word in name.split(".") if not word.isdecimal()}))
            raise ModelError(f"peft.quant_exclude: no linear layer has {part!r} in its name. There are: {known}.")
        for layer in named:
            layer.stays_whole = True


def _quantise(model: Any, cfg: Config) -> None:
    """Replace the linear layers below the head by 4-bit ones, one whole matrix in memory at a time."""
    try:
        from bitsandbytes.nn import modules as bnb
    except ImportError as error:
        raise ModelError('peft=qlora needs bitsandbytes: pip install "gearshift[quant]"') from error
    dtype, storage = _frozen_dtype(cfg), _DTYPES[cfg.peft.quant_storage]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, layer in list(model.named_modules()):
        if not (isinstance(layer, nn.Linear) or _transposed(layer)) or layer is head or f"{name}.weight" in model.fresh:
            continue
        if hasattr(layer, "stays_whole"):
            continue
        weight = model.starting_weights(f"{name}.weight").to(dtype)
        weight = weight.T.contiguous() if _transposed(layer) else weight
        out_features, in_features = weight.shape
        small: Any = bnb.Linear4bit(in_features, out_features, bias=layer.bias is not None, compute_dtype=dtype)
        # In evaluation this CPU path repacks the weights in place, and what is trained afterwards is another model.
        small.support_avx512bf16_for_cpu = False
        quantised: Any = bnb.Params4bit(weight, quant_type="nf4", quant_storage=storage, module=small)
        small.weight = quantised.to("cpu")
        if layer.bias is not None:
            small.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, small)
    model.is_loaded_in_4bit = True  # what peft asks before it puts an adapter on a 4-bit layer


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8}


def _frozen_dtype(cfg: Config) -> torch.dtype:
    """The run's precision; `auto`, where nobody has resolved it yet, keeps fp32."""
    return _DTYPES.get(cfg.train.precision, torch.float32)


def _transposed(layer: nn.Module) -> bool:
    """GPT-2's `Conv1D` is a linear layer whose weight is [in, out]."""
    return type(layer).__name__ == "Conv1D"
