"""What is trained: the kinds of model, what each parameter starts from, dropout that does not depend on the layout.

Owns: `build` (from a config to a module, also on the meta device), `materialise` and `initialise` (from meta to starting
values, one parameter at a time), `KeyedDropout` and `keyed`, and `blocks` (the repeated part of a model).

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
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from train.config import Config


class ModelError(Exception):
    """Something about the model that the user can put right; the message says what was given and what to do."""


Builder = Callable[["Config", Mapping[str, Any]], nn.Module]


def _llama(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    from train.models import lm

    return lm.llama(cfg, info)


def _gpt2(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    from train.models import lm

    return lm.gpt2(cfg, info)


def _vit(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    from train.models import vision

    return vision.vit(cfg, info)


def _convnet(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    from train.models import vision

    return vision.convnet(cfg, info)


def _unet(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    from train.models import vision

    return vision.unet(cfg, info)


def _pretrained(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    from train.models import pretrained

    return pretrained.build(cfg, info)


MODELS: dict[str, Builder] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "vit": _vit,
    "convnet": _convnet,
    "unet": _unet,
    "pretrained": _pretrained,
}
"""Name of a model -> a function of (config, what `prepare` counted) that builds it. Importing this imports no library of models."""


def build(cfg: Config, info: Mapping[str, Any]) -> nn.Module:
    """The model of `cfg` in train mode, its values not yet set: call `initialise` (after `materialise` when on meta).

    `info` is `Prepared.info`: `vocab_size` for a language model, `num_classes` for the others. Under
    `torch.device("meta")` nothing is allocated, QLoRA's 4-bit base excepted. Parameters that are trained are fp32.
    Raises ModelError.
    """
    name = "pretrained" if cfg.model.path else cfg.model.name
    if name not in MODELS:
        raise ModelError(f"model.name={name}: unknown model. Known: {', '.join(MODELS)}.")
    model = MODELS[name](cfg, info)
    _refuse_attention_dropout(model)
    if cfg.peft.name != "none":
        from train.models import pretrained

        model = pretrained.adapt(model, cfg)
    _key_dropout(model)
    return model.train()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks in order (decoder layers, encoder stages): what FSDP2 wraps and checkpointing recomputes.

    They are the children of the outermost `nn.ModuleList`s; a model without one has no blocks. Never a dropout alone.
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
"""Name of a parameter -> its whole starting value (fp32, CPU), or None where it is already in place (4-bit weights)."""


def initial_values(model: nn.Module, seed: int) -> Values:
    """What each parameter of `model` starts from, made when it is asked for and kept nowhere.

    Call it before a strategy shards the model: it notes the whole shapes. A parameter that `model.starting_weights` (set
    by `pretrained.build`) brings is read from there; any other is drawn from a generator seeded by (seed, name):

    - a module with a method `initial(name, generator) -> Tensor | None` decides for its own parameters;
    - norms are 1 and 0, biases 0; `Linear`, `Embedding` and GPT-2's `Conv1D` are normal with the config's
      `initializer_range` (0.02), GPT-2's residual projections that over sqrt(2 x layers), as in transformers;
    - convolutions are normal with variance 2 / fan-in;
    - LoRA's A is uniform in +-1/sqrt(fan-in) and its B is 0, as in peft.

    Asking for a parameter that no rule covers raises ModelError.
    """
    brought: Values = getattr(model, "starting_weights", None) or (lambda name: None)
    owners = {
        f"{prefix}.{leaf}" if prefix else leaf: (module, leaf, parameter.shape)
        for prefix, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    config = getattr(model, "config", None)

    def value(name: str) -> Tensor | None:
        module, leaf, shape = owners[name]
        if hasattr(getattr(module, leaf), "quant_state"):
            return None
        weights = brought(name)
        if weights is not None:
            return weights
        generator = torch.Generator("cpu").manual_seed(_hash64(f"{seed}/{name}"))
        own = module.initial(leaf, generator) if hasattr(module, "initial") else None
        return own if own is not None else _draw(config, module, name, shape, generator)

    return value


def initialise(model: nn.Module, seed: int, only: Collection[str] | None = None) -> None:
    """Set the parameters of an unsharded `model` (those named in `only`) and, without `only`, its buffers too."""
    values = initial_values(model, seed)
    if only is None:
        materialise_buffers(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = values(name) if only is None or name in only else None
            if value is not None:
                parameter.copy_(value)


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Give meta parameters and buffers memory on `device`, its content undefined, keeping shared parameters shared.

    `Module.to_empty` alone makes two parameters out of a tied one. Sharded (DTensor) parameters get their shard only.
    """
    first: dict[int, str] = {}
    shared: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            shared.append((name, first[id(parameter)]))
    for module in model.modules():
        on_meta = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.is_meta]
        if on_meta:
            module.to_empty(device=device, recurse=False)
    for name, source in shared:
        prefix, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(prefix), leaf, model.get_parameter(source))
    materialise_buffers(model)


def materialise_buffers(model: nn.Module) -> None:
    """Compute every buffer anew (rotary frequencies, running statistics): after a meta build they hold nothing.

    Takes each from the checkpoint that the model comes from, from the module's own `initial`, or from the rules of
    transformers. Set parameters afterwards: those rules may touch a parameter of the same module. Raises ModelError.
    """
    brought: Values = getattr(model, "starting_weights", None) or (lambda name: None)
    owner: Any = None
    for prefix, module in model.named_modules():
        if hasattr(module, "_init_weights"):
            owner = module
        buffers = dict(module.named_buffers(recurse=False))
        if not buffers:
            continue
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        elif not hasattr(module, "initial") and owner is not None:
            owner._init_weights(module)
        elif not hasattr(module, "initial"):
            raise ModelError(
                f"{prefix} ({type(module).__name__}) has buffers ({', '.join(buffers)}) that nothing can compute. "
                "Give the module a method initial(name, generator) -> Tensor that returns them."
            )
        for leaf, buffer in buffers.items():
            value = brought(f"{prefix}.{leaf}" if prefix else leaf)
            if value is None and hasattr(module, "initial"):
                value = module.initial(leaf, torch.Generator("cpu").manual_seed(0))
            if value is not None:
                buffer.copy_(value)


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
        fan_in = math.prod(shape[1:])
        return empty.normal_(0.0, math.sqrt(2 / fan_in), generator=generator)
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

    Input: any float tensor whose leading dimension is the samples of the batch given to `keyed`. Elements are zeroed with
    probability `p` and the others scaled by 1/(1-p), in training only; identity otherwise. Used outside `keyed` in
    training it raises RuntimeError rather than drop something that could not be reproduced.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ModelError(f"dropout={p}: give a probability in [0, 1).")
        self.p = float(p)
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
        element = _mix(torch.arange(x[0].numel(), device=x.device) & _MASK32)
        bits = _mix(_mix(samples.to(x.device) ^ self.salt)[:, None] ^ element)
        keep = bits >= int(self.p * (1 << 32))
        return x * (keep.view(x.shape).to(x.dtype) / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


_KEYS: WeakKeyDictionary[nn.Module, list[_Key]] = WeakKeyDictionary()


@contextmanager
def keyed(model: nn.Module, batch: Mapping[str, Tensor], seed: int) -> Iterator[None]:
    """Key the dropout of `model` (wrapped or not) by the samples of `batch`. Run forward *and* backward inside.

    Reads `sample` and `epoch`, int64[B]. The backward pass belongs inside because activation checkpointing runs forwards
    there. A model without dropout costs nothing.
    """
    keys = _KEYS.get(model)
    if keys is None:
        keys = list({id(m.key): m.key for m in model.modules() if isinstance(m, KeyedDropout) and m.p > 0}.values())
        _KEYS[model] = keys
    if keys:
        sample, epoch = batch["sample"], batch["epoch"]
        words = (_hash64(f"dropout/{seed}") & _MASK32, sample & _MASK32, (sample >> 32) & _MASK32, epoch & _MASK32)
        state = torch.zeros_like(sample)
        for word in words:
            state = _mix(state ^ word)
        for key in keys:
            key.samples = state
    try:
        yield
    finally:
        for key in keys:
            key.samples = None


def _key_dropout(model: nn.Module) -> None:
    """Put `KeyedDropout` in the place of every `nn.Dropout`, and tell each its name. They share one key."""
    key = _Key()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            module = KeyedDropout(module.p)
            if isinstance(owner, nn.ModuleDict | nn.ModuleList | nn.Sequential):
                owner._modules[leaf] = module
            else:
                setattr(owner, leaf, module)
        if isinstance(module, KeyedDropout):
            module.key, module.salt = key, _hash64(name) & _MASK32


def _refuse_attention_dropout(model: nn.Module) -> None:
    """Attention dropout happens inside fused kernels, which no key reaches."""
    config = getattr(model, "config", None)
    for field in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if (getattr(config, field, None) or 0.0) > 0.0:
            raise ModelError(
                f"{field}={getattr(config, field)} of this model: attention dropout is drawn inside fused attention "
                "kernels, from the device's generator, so it would differ between micro-batches, ranks and devices. "
                f"Set {field} to 0 in the model's config.json; model.dropout and peft.dropout are supported."
            )
