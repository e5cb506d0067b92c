"""Moments of AdamW that bitsandbytes keeps in 8 bits, as the fp32 ranges that checkpoints hold.

Owns: the names inside bitsandbytes' state. Does not own: the optimizer (`train.optim`), or who may use it: blocks of 256
follow whole parameters, so only engines that shard nothing.

A moment is saved as the fp32 numbers that its codes stand for. Going on rounds them to codes once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # numbers under one scale, in bitsandbytes


def moments(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    """Both moments of `p`, fp32 and of its shape: copies. Makes the state if the first step has not made it yet."""
    if not optimizer.state[p]:
        for g, group in enumerate(optimizer.param_groups):
            for i, q in enumerate(group["params"]):
                if q is p:
                    optimizer.init_state(group, p, g, i)
    return {kind: _number(optimizer.state[p], i) for kind, i in (("exp_avg", 1), ("exp_avg_sq", 2))}


def _number(state: dict[str, Any], i: int) -> Tensor:
    from bitsandbytes import functional

    codes: Tensor = state[f"state{i}"]
    if codes.dtype == torch.float32:  # parameters below 4,096 elements are left alone
        return codes.clone()
    found: Tensor = functional.dequantize_blockwise(
        codes, absmax=state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=BLOCK
    )
    return found


def store(optimizer: Any, p: Tensor, kind: str, value: Tensor) -> None:
    """Replace one moment of `p` by `value`, fp32 and flat."""
    from bitsandbytes import functional

    state, i = optimizer.state[p], 1 if kind == "exp_avg" else 2
    codes = state[f"state{i}"].view(-1)
    if codes.dtype == torch.float32:
        codes.copy_(value)
        return
    value = value.to(codes.device)
    found, scales = functional.quantize_blockwise(value, code=state[f"qmap{i}"], blocksize=BLOCK)
    codes.copy_(found)
    state[f"absmax{i}"].copy_(scales.absmax)
