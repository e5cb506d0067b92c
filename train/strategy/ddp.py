"""Replicas with one gradient all-reduce a step, through Accelerate.

Owns: wrapping in DistributedDataParallel, and holding reduction back until the last micro-step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.strategy import Mismatch, Strategy, Values, materialise


class DDP(Strategy):
    """DistributedDataParallel. It averages gradients over ranks, which `scale` undoes."""

    def wrap(self, values: Values, blocks: list[nn.Module]) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        materialise(self.module, self.procs.device, values)
        options = DistributedDataParallelKwargs(
            bucket_cap_mb=self.cfg.strategy.bucket_mb, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        # Without cpu=True, CPU ranks would each train alone, silently; precision is ours (autocast), not Accelerate's.
        self.accelerator = Accelerator(
            cpu=self.procs.device.type == "cpu", mixed_precision="no", kwargs_handlers=[options]
        )
        if self.accelerator.num_processes != self.procs.world_size:
            raise Mismatch(f"Accelerate sees {self.accelerator.num_processes} processes, not {self.procs.world_size}")
        # Accelerate leaves a world of one unwrapped; asked for by name, it is wrapped all the same.
        alone = self.procs.world_size == 1
        self.model = DistributedDataParallel(self.module) if alone else self.accelerator.prepare_model(self.module)

    @property
    def settles(self) -> bool:
        """Buckets follow the order in which gradients came first, and where a parameter lies in its bucket decides in which
        order ranks are added. Two numbers have one sum."""
        return self.procs.world_size > 2

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        held: Any = contextlib.nullcontext() if last else self.model.no_sync()
        with held, self.autocast():
            yield

    def name_in_force(self) -> str:
        return "ddp" if isinstance(self.model, DistributedDataParallel) else type(self.model).__name__
