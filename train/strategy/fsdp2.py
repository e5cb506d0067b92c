"""Parameters, gradients and optimizer state sharded over the ranks, with torch's own `fully_shard`.

Owns: the mesh, the mixed-precision policy, sharding block by block, and filling each shard without any rank holding the
whole model. The same path on CPU and GPU: Accelerate's path is GPU-only and silently gives DDP on a CPU.

Gradients are reduced in every micro-step, so that no rank ever holds a whole unsharded gradient between micro-steps.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.strategy import DTYPES, Mismatch, Strategy, Values, dtypes


class FSDP2(Strategy):
    """torch FSDP2. Its reduce-scatter averages over ranks, which `scale` undoes."""

    replicated = False

    def wrap(self, values: Values, blocks: list[nn.Module]) -> None:
        device = self.procs.device
        mesh = init_device_mesh(device.type, (self.procs.world_size,))
        compute = None if self.precision == "fp32" else DTYPES[self.precision]
        # Its default would reduce gradients in bf16; accumulation and reduction are fp32 on every engine. Only what leaves
        # the model is turned into fp32: between blocks the activations stay as they are.
        inner = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        outer = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, output_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=inner)
        fully_shard(self.module, mesh=mesh, mp_policy=outer, reshard_after_forward=False)

        placed: dict[int, nn.Parameter] = {}
        for owner in self.module.modules():
            for leaf, p in list(owner._parameters.items()):
                if p is not None and p.is_meta:
                    if id(p) not in placed:  # tied parameters stay tied
                        placed[id(p)] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                    owner._parameters[leaf] = placed[id(p)]
            for leaf, buffer in list(owner._buffers.items()):
                if buffer is not None:
                    owner._buffers[leaf] = buffer.to(device)
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                start, piece = self.piece(p)
                value = values(name)
                if value is not None and piece.numel():
                    piece.view(-1).copy_(value.view(-1)[start : start + piece.numel()])
        self.model = self.module

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the policy casts

    def piece(self, p: Tensor) -> tuple[int, Tensor]:
        """Whole rows: sharded on dimension 0 in chunks of ceil(rows / W), so the last ranks may hold fewer, or none."""
        if not isinstance(p, DTensor):
            raise Mismatch(f"strategy: asked fsdp2, got a parameter of {tuple(p.shape)} that no rank shares")
        _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        row = p.numel() // p.shape[0] if p.ndim else 1
        return (offset[0] * row if p.ndim else 0), p.to_local()

    def _swap_ema(self, masters: dict[str, Tensor]) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.reshard()  # a forward without a backward (an evaluation) leaves the outermost parameters gathered
        super()._swap_ema(masters)

    def grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self.trainable().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def in_force(self) -> dict[str, Any]:
        shards = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        groups = [m._get_fsdp_state()._fsdp_param_group for m in shards]
        reduced = dtypes(g.mp_policy.reduce_dtype for g in groups if g is not None)
        found, ranks = super().in_force(), self.procs.world_size
        rows = ((p, -(-p.shape[0] // ranks)) for p in self.module.parameters())  # of which no rank has more
        most = sum(n * (p.numel() // p.shape[0]) * p.element_size() for p, n in rows)
        return {**found, "unsharded_bytes": found["local_bytes_at_most"], "local_bytes_at_most": most,
                "reduce_dtype": reduced}  # fmt: skip

    def name_in_force(self) -> str:
        sharded = isinstance(self.module, FSDPModule) and all(isinstance(p, DTensor) for p in self.module.parameters())
        return "fsdp2" if sharded else type(self.model).__name__
