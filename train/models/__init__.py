"""What is trained: the kinds of model, what each parameter starts from, dropout that does not depend on the layout.

Owns: `build` (from a config to a module whose parameters hold nothing yet), `initial_values` (what each of them starts
from, one at a time), `KeyedDropout` and `keyed`, and `blocks` (the repeated part of a model).

Does not own: the networks (`lm.py`, `vision.py`), where pretrained weights are read and adapters are put in
(`pretrained.py`), the loss (`train/tasks`), how parameters are laid out over ranks (`train/strategy`).

Two promises that the laws of the project rest on:

- A parameter's starting value is a function of (seed, name) alone, drawn on the CPU; or it is read from a checkpoint by
  name. So any rank can fill any parameter at any time without holding another one.
- A dropout mask is a function of (seed, epoch, sample, module name, element) alone; so it does not move with the
  micro-batch, the rank, the device, or recomputation in the backward pass.

A plug-in adds a model with `MODELS["mine"] = builder`.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

if TYPE_CHECKING:
    from train.config import Config


class ModelError(Exception):
    """Something about the model that the user can put right; the message says what was given and what to do."""


Builder = Callable[["Config", Mapping[str, Any]], nn.Module]


def _later(module: str, name: str) -> Builder:
    """A builder whose module, and the libraries behind it, are imported when it is used."""
    return lambda cfg, info: getattr(import_module(f"train.models.{module}"), name)(cfg, info)


MODELS: dict[str, Builder] = {
    "llama": _later("lm", "llama"),
    "gpt2": _later("lm", "gpt2"),
    "vit": _later("vision", "vit"),
    "convnet": _later("vision", "convnet"),
    "unet": _later("vision", "unet"),
}
"""Name of a model -> a function of (config, what `prepare` counted) that builds it."""


def build(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    """The model of `cfg` in train mode: parameters on meta, buffers (and QLoRA's 4-bit base) real, on the CPU.

    `info` is `Prepared.info`: `vocab_size` for a language model, `num_classes` for the others. Parameters that are
    trained are fp32, frozen ones have the run's precision. Their values come from `initial_values`, one at a time;
    `initialise` sets all of them. Raises ModelError.
    """
    from train.models import pretrained

    if cfg.model.path is not None:
        model = pretrained.build(cfg, info)
    elif cfg.model.name in MODELS:
        with parameters_on_meta():
            model = MODELS[cfg.model.name](cfg, info)
    else:
        raise ModelError(f"model.name={cfg.model.name}: unknown without model.path. Known: {', '.join(MODELS)}.")
    _refuse_attention_dropout(model)
    _refuse_plain_dropout(model)
    with parameters_on_meta():
        if cfg.peft.name != "none":
            model = pretrained.adapt(model, cfg)
    _key_dropout(model)
    return model.train()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, a parameter is on meta from the moment it belongs to a module; buffers compute themselves as ever."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if _in_memory or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


_in_memory = False


@contextmanager
def parameters_in_memory() -> Iterator[None]:
    """Inside, though that is inside `parameters_on_meta`, parameters hold values: for a loader that reads into them."""
    global _in_memory
    before, _in_memory = _in_memory, True
    try:
        yield
    finally:
        _in_memory = before


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks in order (decoder layers, encoder stages): what FSDP2 wraps and checkpointing recomputes.

    They are the children of the outermost `nn.ModuleList`s; a model without one has no blocks.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(block for block in child if next(block.parameters(), None) is not None)
            else:
                visit(child)

    visit(model)
    return found


# ---- Starting values -------------------------------------------------------------------------------------------------

Values = Callable[[str], Tensor | None]
"""Name of a parameter -> its whole starting value, fp32 on the CPU, or None where it is in place (4-bit weights)."""


def initial_values(model: nn.Module, seed: int) -> Values:
    """What each parameter of `model` starts from, made when it is asked for and kept nowhere.

    Call it before a strategy shards the model: it notes the whole shapes. A parameter that `model.starting_weights`
    (set by `pretrained.py`) brings is read from there; any other is drawn from a generator seeded by (seed, name):

    - a module with a method `initial(name, generator) -> Tensor | None` decides for its own parameters;
    - norms are 1 and 0, biases 0; `Linear`, `Embedding` and GPT-2's `Conv1D` are normal with the config's
      `initializer_range` (0.02), GPT-2's residual projections that over sqrt(2 x layers), as in transformers;
    - convolutions are normal with variance 2 / fan-in;
    - LoRA's A is uniform in +-1/sqrt(fan-in) and its B is 0, as in peft.

    Asking for a parameter that no rule covers raises ModelError.
    """
    brought: Values = getattr(model, "starting_weights", None) or (lambda name: None)
    in_place = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    config = getattr(model, "config", None)
    owners = {
        f"{prefix}.{leaf}" if prefix else leaf: (module, leaf, parameter.shape)
        for prefix, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    }

    def value(name: str) -> Tensor | None:
        if name in in_place:
            return None
        weights = brought(name)
        if weights is not None:
            return weights
        module, leaf, shape = owners[name]
        source = generator(f"{seed}/{name}")
        own = module.initial(leaf, source) if hasattr(module, "initial") else None
        return own if own is not None else _draw(config, module, name, shape, source)

    return value


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Put every meta parameter of an unsharded `model` on the CPU with its starting value. Tied ones stay tied."""
    values = initial_values(model, seed)
    filled: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:
                value = values(f"{prefix}.{leaf}" if prefix else leaf)
                filled[id(parameter)] = (
                    parameter if value is None else nn.Parameter(value.to(parameter.dtype), parameter.requires_grad)
                )
            module._parameters[leaf] = filled[id(parameter)]
    return model


def _draw(config: Any, module: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The starting value of a parameter that no checkpoint brings; see `initial_values` for the rules."""
    leaf = name.rpartition(".")[2]
    kind = type(module).__name__
    empty = torch.empty(shape, dtype=torch.float32, device="cpu")
    if ".lora_B." in name or ".lora_embedding_A." in name:
        return empty.zero_()
    if ".lora_A." in name:
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return empty.uniform_(-bound, bound, generator=generator)
    if "Norm" in kind:
        return empty.fill_(1.0 if leaf == "weight" else 0.0)
    if leaf == "bias" or leaf.endswith("_bias"):
        return empty.zero_()
    if isinstance(module, nn.modules.conv._ConvNd):
        return empty.normal_(0.0, math.sqrt(2 / math.prod(shape[1:])), generator=generator)
    if len(shape) < 2:
        raise ModelError(
            f"No rule says what {name} of a {kind} starts from. Give the module a method "
            "initial(name, generator) -> Tensor that returns its parameters' starting values."
        )
    std = getattr(config, "initializer_range", None) or 0.02
    if getattr(config, "model_type", None) == "gpt2" and name.endswith("c_proj.weight"):
        std /= math.sqrt(2 * config.n_layer)
    empty.normal_(0.0, std, generator=generator)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        empty[module.padding_idx] = 0.0
    return empty


def generator(key: str) -> torch.Generator:
    """A generator on the CPU whose draws are a function of `key`."""
    return torch.Generator("cpu").manual_seed(_hash64(key))


def _hash64(text: str) -> int:
    """63 bits of sha256: the same on every platform, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


# ---- Dropout ---------------------------------------------------------------------------------------------------------

_MASK32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that looks random (Wellons' `lowbias32`), on int64 tensors that hold them.

    The multipliers are signed 32-bit numbers, so no product leaves int64 and every device and compiler agrees.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - (1 << 32))) & _MASK32
    return x ^ (x >> 16)


class _Key:
    """What the dropout modules of one model share: the keys of the samples that are in the model now."""

    def __init__(self) -> None:
        self.samples: Tensor | None = None


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (seed, epoch, sample, module name, element).

    Input: a float tensor whose leading dimension is the samples of the batch given to `keyed`. Elements are zeroed
    with probability `p` and the others scaled by 1/(1-p), in training only. The mask spans the first `axes` dimensions
    and is shared over the rest: 2 drops whole channels of an image, None single elements. Used in training outside
    `keyed` it raises RuntimeError.
    """

    def __init__(self, p: float, axes: int | None = None) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ModelError(f"dropout={p}: give a probability in [0, 1).")
        self.p = float(p)
        self.axes = axes
        self.key = _Key()
        self.salt = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        samples = self.key.samples
        if samples is None:
            raise RuntimeError("dropout in training outside `with keyed(model, batch, seed)`: no sample to key it by")
        if x.shape[0] != samples.shape[0]:
            raise RuntimeError(f"dropout of {tuple(x.shape)} with {samples.shape[0]} samples: samples come first")
        own = x.shape[: self.axes]
        element = _mix(torch.arange(math.prod(own[1:]), device=x.device))
        bits = _mix(_mix(samples.to(x.device) ^ self.salt)[:, None] ^ element)
        keep = (bits >= int(self.p * (1 << 32))).view(*own, *[1] * (x.dim() - len(own)))
        return x * (keep.to(x.dtype) / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}" if self.axes is None else f"p={self.p}, axes={self.axes}"


_KEYS: WeakKeyDictionary[nn.Module, list[_Key]] = WeakKeyDictionary()


@contextmanager
def keyed(model: nn.Module, batch: Mapping[str, Tensor], seed: int) -> Iterator[None]:
    """Key the dropout of `model` (wrapped or not) by the samples of `batch`. Run forward *and* backward inside.

    Reads `sample` and `epoch`, int64[B]. The backward pass belongs inside because activation checkpointing runs
    forwards there. A model without dropout costs a look-up.
    """
    keys = _KEYS.get(model)
    if keys is None:
        keys = list({id(m.key): m.key for m in model.modules() if isinstance(m, KeyedDropout) and m.p > 0}.values())
        _KEYS[model] = keys
    if keys:
        state = _mix(torch.full_like(batch["sample"], _hash64(f"dropout/{seed}") & _MASK32))
        for word in (batch["sample"], batch["sample"] >> 32, batch["epoch"]):
            state = _mix(state ^ (word & _MASK32))
        for key in keys:
            key.samples = state
    try:
        yield
    finally:
        for key in keys:
            key.samples = None


def _key_dropout(model: nn.Module) -> None:
    """Put `KeyedDropout` in the place of every dropout that draws from a generator, and tell each its name."""
    key = _Key()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            module = KeyedDropout(module.p)
        elif isinstance(module, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module = KeyedDropout(module.p, axes=2)
        if isinstance(module, KeyedDropout):
            module.key, module.salt = key, _hash64(name) & _MASK32
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = module


def _refuse_attention_dropout(model: nn.Module) -> None:
    """Attention dropout happens inside fused kernels, which no key reaches."""
    config = getattr(model, "config", None)
    for field in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if (getattr(config, field, None) or 0.0) > 0.0:
            raise ModelError(
                f"This model's config.json says {field}={getattr(config, field)}. Attention dropout is drawn inside "
                "fused kernels from the device's generator, so it would differ between micro-batches, ranks and "
                f"devices. Set {field} to 0 in a copy of the model's directory (`hf download ID --local-dir DIR` makes "
                "one) and give model.path=DIR. Dropout elsewhere in the model, model.dropout and peft.dropout are kept."
            )


def _refuse_plain_dropout(model: nn.Module) -> None:
    """Dropout called as a function, and layers left out at random, draw from a generator, which no key reaches.

    They are known by a rate that a module keeps as a number and that some method of it other than its first reads; so
    the check is over once the model is built, and costs a step nothing.
    """
    for name, module in model.named_modules():
        for field, rate in vars(module).items():
            if "drop" in field and isinstance(rate, float) and rate > 0.0 and _reads(type(module), field):
                known = vars(getattr(model, "config", None) or module)
                said = [f"{key}={value}" for key, value in known.items() if "drop" in key and value]
                raise ModelError(
                    f"{name} is a {type(module).__name__} that drops by {field}={rate} from the device's generator, so it "
                    "would differ between micro-batches, ranks and devices. Set its rates to 0 in config.json, in a copy "
                    "of the model's directory (`hf download ID --local-dir DIR` makes one), and give model.path=DIR. It "
                    f"has: {', '.join(said)}. peft.dropout is kept."
                )


def _reads(kind: type, field: str) -> bool:
    methods = [vars(base)[n] for base in kind.__mro__ if base.__module__ != nn.Module.__module__ for n in vars(base)]
    codes = [getattr(inspect.unwrap(m), "__code__", None) for m in methods if callable(m)]
    return any(code is not None and code.co_name != "__init__" and field in code.co_names for code in codes)
