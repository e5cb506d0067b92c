"""Networks for pictures, from scratch or from a checkpoint.

Owns: `unet` (a class per pixel), `vit` and `convnet` (a class per picture), and `stand_alone`, what a network of
transformers needs to be trained like them: BatchNorm statistics that stand still, draws keyed by sample.

Does not own: starting values (`train/models/__init__.py`, except where a layer says `initial`), reading checkpoints
(`pretrained.py`), normalisation of pixels (`train/data/views.py`), the loss.

All take normalised images, float [B, C, H, W], and return logits [B, K] or, for a class per pixel, [B, K, H, W]. No
layer looks across samples: normalisation is over the channels and pixels of one sample, so a batch may be cut anywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from train.models import KeyedDropout, ModelError

if TYPE_CHECKING:
    from train.config import Config, ModelConfig


def unet(cfg: Config, info: Mapping[str, Any]) -> UNet:
    """U-Net of `model.num_layers` resolutions: `model.channels` in the first, over patches of `model.patch_size` pixels,
    doubling up to eight times that."""
    return UNet(cfg.model, info["channels"], info["num_classes"])


def convnet(cfg: Config, info: Mapping[str, Any]) -> ConvNet:
    """ConvNeXt-like: patches of `model.patch_size`, then `model.num_layers` stages, `model.channels` and doubling."""
    return ConvNet(cfg.model, info["channels"], info["num_classes"])


def vit(cfg: Config, info: Mapping[str, Any]) -> ViT:
    """Vision transformer over squares of `data.image_size`, in patches of `model.patch_size`."""
    return ViT(cfg.model, info["channels"], info["num_classes"], grid=cfg.data.image_size // cfg.model.patch_size)


def stand_alone(model: nn.Module) -> nn.Module:
    """Make a network from elsewhere treat each sample alone and the same each time; changes `model` and returns it.

    BatchNorm runs on the statistics it came with and never updates them (its scale and shift train like any parameter);
    stochastic depth drops the branches that the sample's key says. Names of parameters do not change.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            if module.running_mean is None or type(module).__module__ != _BatchNorm.__module__:
                raise ModelError(
                    f"{name} is a {type(module).__name__} without statistics of its own to stand on, so every sample would "
                    "depend on the batch it is in. Give a model with nn.BatchNorm, or without norms over samples."
                )
            module.__class__ = FrozenBatchNorm  # in place: parameters, buffers and their names stay what they are
        elif type(module).__name__.endswith("DropPath"):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = KeyedDropout(float(module.drop_prob or 0.0), axes=1)
    return model


class FrozenBatchNorm(_BatchNorm):
    """BatchNorm on its running statistics in training too, so that no sample sees another; over any dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def idle(model: nn.Module, channels: int, size: int) -> list[str]:
    """The trained parameters that no logit depends on, by a step over fake tensors. Nothing is computed or allocated.

    Such a parameter gets no gradient, and ranks that reduce gradients would wait for it. Raises ModelError for a model
    that does not take pictures of `size` x `size` pixels.
    """
    copied = copy.deepcopy(model).eval()  # some keep what they computed last
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), torch.enable_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors}
        trained = [state[name].requires_grad_() for name in names]
        try:
            out: Any = torch.func.functional_call(copied, state, (torch.empty(1, channels, size, size),))
        except (UnsupportedFakeTensorException, DynamicOutputShapeException, DataDependentOutputException):
            return []  # its operators depend on values: only a real step can tell
        except (ValueError, RuntimeError) as error:
            own = getattr(getattr(model, "config", None), "image_size", None)
            hint = f" Set data.image_size={own}." if isinstance(own, int) and own != size else ""
            raise ModelError(
                f"data.image_size={size}: this {type(model).__name__} does not take such pictures: {error}{hint}"
            ) from error
        logits = out if isinstance(out, Tensor) else out.logits
        gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


# ---- U-Net -----------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Down through `widths`, back up with skips; a patch's features say the class of each of its pixels. Takes any
    height and width: odd ones are rounded up on the way down."""

    def __init__(self, m: ModelConfig, channels: int, num_classes: int) -> None:
        super().__init__()
        widths, eps, self.patch = _widths(m), m.norm_eps, m.patch_size
        pairs = list(pairwise(widths))
        self.stem = nn.Conv2d(channels, widths[0], self.patch + 2, stride=self.patch, padding=1)
        self.down = nn.ModuleList(Residual(a, a, eps=eps) for a in widths[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.middle = nn.ModuleList([Residual(widths[-1], widths[-1], m.dropout, eps)])
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.up = nn.ModuleList(Residual(2 * a, a, eps=eps) for a, _ in reversed(pairs))
        self.norm = _group_norm(widths[0], eps)
        self.head = nn.Conv2d(widths[0], num_classes * self.patch**2, 1)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = self.stem(F.pad(image, (0, -width % self.patch, 0, -height % self.patch)))
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            x = block(x)
            skips.append(x)
            x = shrink(x)
        for block in self.middle:
            x = block(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            skip = skips.pop()
            x = block(torch.cat([skip, F.interpolate(grow(x), size=skip.shape[-2:], mode="nearest")], dim=1))
        logits = F.pixel_shuffle(self.head(F.silu(self.norm(x))), self.patch)
        return logits[..., :height, :width]


class Residual(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, beside a 1x1 one where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1, self.norm2 = _group_norm(channels_in, eps), _group_norm(channels_out, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.dropout = KeyedDropout(dropout, axes=2)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return self.skip(x) + y


# ---- ConvNet ---------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Patches, stages of depthwise blocks with halving in between, mean over pixels, linear."""

    def __init__(self, m: ModelConfig, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = _widths(m)
        self.stem = nn.Conv2d(channels, widths[0], m.patch_size + 2, stride=m.patch_size, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1)] if i else []),
                *(Mixer(width, m.dropout, m.norm_eps) for _ in range(2)),
            )
            for i, width in enumerate(widths)
        )
        self.norm = nn.LayerNorm(widths[-1], m.norm_eps)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x.mean(dim=(2, 3))))


class Mixer(nn.Module):
    """ConvNeXt block: 5x5 depthwise convolution, one GroupNorm over the sample, an MLP four times as wide."""

    def __init__(self, width: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width, eps)
        self.grow = nn.Conv2d(width, 4 * width, 1)
        self.project = nn.Conv2d(4 * width, width, 1)
        self.dropout = KeyedDropout(dropout, axes=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.project(F.gelu(self.grow(self.norm(self.spatial(x))))))


# ---- ViT -------------------------------------------------------------------------------------------------------------


class ViT(nn.Module):
    """Patches of a `grid` x `grid` square with learned positions, pre-norm blocks, mean over patches, linear."""

    def __init__(self, m: ModelConfig, channels: int, num_classes: int, *, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Conv2d(channels, m.hidden_size, m.patch_size, stride=m.patch_size)
        self.positions = nn.Parameter(torch.empty(1, grid * grid, m.hidden_size))
        self.dropout = KeyedDropout(m.dropout)
        self.blocks = nn.ModuleList(Block(m) for _ in range(m.num_layers))
        self.norm = nn.LayerNorm(m.hidden_size, m.norm_eps)
        self.head = nn.Linear(m.hidden_size, num_classes)

    def initial(self, name: str, generator: torch.Generator) -> Tensor | None:
        """Positions start from sines and cosines of row and column: neighbours are alike from the first step."""
        return _sincos(self.grid, self.positions.shape[2]) if name == "positions" else None

    def forward(self, image: Tensor) -> Tensor:
        x = self.dropout(self.embed(image).flatten(2).transpose(1, 2) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class Block(nn.Module):
    """Attention and MLP, each after LayerNorm and with dropout before it joins the residual stream."""

    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        width, hidden = m.hidden_size, m.intermediate_size or 4 * m.hidden_size
        self.heads = m.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, m.norm_eps), nn.LayerNorm(width, m.norm_eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.project = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout1, self.dropout2 = KeyedDropout(m.dropout), KeyedDropout(m.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout1(self.out(mixed))
        return x + self.dropout2(self.project(F.gelu(self.grow(self.norm2(x)))))


def _sincos(grid: int, width: int) -> Tensor:
    """[1, grid * grid, width]: a quarter each for sines and cosines of the row and of the column, 0 in the rest."""
    quarter = width // 4
    rates = torch.exp(torch.arange(quarter, dtype=torch.float64) * (-math.log(100.0) / max(1, quarter)))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.zeros(grid, grid, width, dtype=torch.float64)
    table[..., : 2 * quarter] = waves[:, None]
    table[..., 2 * quarter : 4 * quarter] = waves[None, :]
    return table.view(1, grid * grid, width).float() * 0.1


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Groups of 16 channels or more: in a smaller one, a feature that is nowhere is blown up to noise."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels, eps)


def _widths(m: ModelConfig) -> list[int]:
    """Channels of each stage."""
    return [m.channels * min(2**stage, 8) for stage in range(m.num_layers)]
