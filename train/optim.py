"""The optimizer over named parameters, and the learning rate as a pure function of the step.

Owns: parameter groups, the choice of optimizer, the schedules.
Does not own: when the optimizer steps, or where its state lies (`train.strategy`).

There is no scheduler object: a schedule that counts its own calls is stepped once per process by some libraries, and has to
be saved and restored. `lr(cfg, step, total)` needs neither.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from train.config import Config, ConfigError


def build(parameters: dict[str, Any], cfg: Config, *, device_type: str) -> torch.optim.Optimizer:
    """The optimizer over `parameters` (name -> parameter, trainable only). Matrices decay; vectors do not."""
    decayed = [p for p in parameters.values() if _dimensions(p) >= 2]
    others = [p for p in parameters.values() if _dimensions(p) < 2]
    groups = [{"params": decayed, "weight_decay": cfg.optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    o = cfg.optim
    if o.name == "sgd":
        return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)
    if o.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ConfigError(['optim=adamw_8bit needs bitsandbytes: pip install "gearshift[quant]"']) from None

        return AdamW8bit(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps)
    fused = cfg.strategy.fused_optimizer
    if fused is None:
        fused = device_type == "cuda" and cfg.numerics == "fast"
    options: dict[str, Any] = {"fused": True} if fused else {"foreach": cfg.numerics == "fast"}
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, **options)


def _dimensions(p: Any) -> int:
    """Of the unsharded parameter: ZeRO-3 leaves an empty vector in its place."""
    return len(p.ds_shape) if hasattr(p, "ds_shape") else p.ndim


def lr(cfg: Config, step: int, total: int) -> float:
    """Learning rate of step `step` (1 to `total`): linear warm-up to `optim.lr`, then the schedule's decay."""
    o = cfg.optim
    if step <= o.warmup_steps:
        return o.lr * step / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, total - o.warmup_steps)
    final = o.final_lr_fraction
    if o.schedule == "constant":
        factor = 1.0
    elif o.schedule == "linear":
        factor = 1 - (1 - final) * done
    elif o.schedule == "cosine":
        factor = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    else:  # wsd: flat until the last decay_fraction of the run, then linear
        left = (1 - done) / o.decay_fraction
        factor = 1.0 if left >= 1 else final + (1 - final) * left
    return o.lr * factor
