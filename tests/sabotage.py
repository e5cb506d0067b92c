"""Ways to be wrong that look right: each breaks the product, for real, in the runs whose name ends in `--<way>`.

`ranks.run_jobs(2, jobs, setup=sabotage.SETUP)` puts them into every rank; runs with other names are left alone. What they
imitate are the silent failures of training scripts: the losses of some look right for many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

SETUP = "from tests import sabotage; sabotage.install()"

CURVES = {
    "mean-of-means": "every rank divides by its own tokens",
    "loss-times-world": "the loss is scaled by the number of ranks once more",
    "clip-before-reduce": "every rank clips its own gradient, then they are averaged",
    "no-clip": "nothing clips, though the config says so",
    "lr-per-rank": "the schedule is stepped once per rank",
    "alone": "every rank trains by itself",
}
"""What a curve has to show: nothing at start-up can."""
STARTS = {
    "ignored-plugin": ("zero3", "fp32", "asked zero3"),
    "not-sharded": ("fsdp2", "fp32", "asked fsdp2"),
    "clip-left-out": ("zero2", "fp32", "clip: asked"),
    "accumulates-once-more": ("zero2", "fp32", "gradient_accumulation_steps: asked"),
    "reduces-in-bf16": ("fsdp2", "bf16", "reduce_dtype: asked float32"),
    "sums-in-bf16": ("zero2", "bf16", "accumulation_dtype: asked float32"),
    "trains-bf16-weights": ("ddp", "bf16", "master_dtype: asked float32, got bfloat16"),
    "computes-in-fp32": ("ddp", "bf16", "precision: asked bf16, the model multiplies in float32"),
    "same-samples": ("ddp", "fp32", "samples: 4 of 8 went to more than one rank"),
    "half-of-each-batch": ("ddp", "fp32", "batch: asked 2 micro-batches of 2, the model got [1, 1]"),
}
"""What start-up has to refuse: way -> (strategy, precision, words of the error)."""
NAN = "nan"
"""The gradient of the third micro-batch of the last rank is not a number; its loss is one."""
RANK_ORDER = "rank-order"
"""Exact numerics that sum gradients rank by rank instead of along the tree."""


def install() -> None:
    """Replace the functions that the ways change by ones that change them in their runs only."""
    import accelerate
    import torch
    import torch.distributed as dist

    from train import optim
    from train.data import loader
    from train.strategy import Processes, Strategy, ddp, exact, fsdp2, zero
    from train.tasks import causal_lm

    way, losses = "", 0

    def instead(owner: Any, name: str) -> Callable[[Any], None]:
        return lambda make: setattr(owner, name, make(getattr(owner, name)))

    @instead(Strategy, "__init__")
    def _(original: Any) -> Any:
        def init(self: Any, cfg: Any, name: str, procs: Any, precision: str) -> None:
            nonlocal way, losses
            way, losses = cfg.run.name.partition("--")[2], 0
            original(self, cfg, name, procs, precision)
            if way == "loss-times-world":
                self.scale *= procs.world_size

        return init

    @instead(causal_lm.CausalLM, "loss")
    def _(original: Any) -> Any:
        def loss(self: Any, model: Any, batch: Any) -> Any:
            nonlocal losses
            losses += 1
            total, count = original(self, model, batch)
            last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
            if way == NAN and losses == 3 and last:
                total.register_hook(lambda gradient: gradient * float("nan"))
            return total, count

        return loss

    @instead(Processes, "sum")
    def _(original: Any) -> Any:
        def sum_(self: Any, tensor: Any) -> Any:
            own = tensor.flatten()[0].item()
            total = original(self, tensor)
            if way == "mean-of-means" and tensor.dtype == torch.int64 and tensor.numel() == 5:  # a step's counts
                total[0] = own * self.world_size
            return total

        return sum_

    @instead(loader.Loader, "micro_batches")
    def _(original: Any) -> Any:
        def micro_batches(self: Any, step: int) -> Any:
            found = original(self, step)
            if way == "same-samples":
                return [
                    {**batch, "sample": torch.arange(len(batch["sample"])) + 100 * i} for i, batch in enumerate(found)
                ]
            half = [{key: value[: len(value) // 2] for key, value in batch.items()} for batch in found]
            return half if way == "half-of-each-batch" else found

        return micro_batches

    @instead(Strategy, "autocast")
    def _(original: Any) -> Any:
        return lambda self: nullcontext() if way == "computes-in-fp32" else original(self)

    @instead(Strategy, "step")
    def _(original: Any) -> Any:
        def step(self: Any, lr: float) -> Any:
            asked = self.cfg
            if way == "clip-before-reduce":
                parameters = list(self.trainable().values())
                torch.nn.utils.clip_grad_norm_(parameters, asked.optim.clip)
                for p in parameters:
                    dist.all_reduce(p.grad)
                    p.grad /= self.procs.world_size
            if way == "no-clip":
                self.cfg = replace(asked, optim=replace(asked.optim, clip=None))
            try:
                return original(self, lr)
            finally:
                self.cfg = asked

        return step

    @instead(ddp.DDP, "micro_step")
    def _(original: Any) -> Any:
        @contextmanager
        def micro_step(self: Any, *, last: bool) -> Iterator[None]:
            with original(self, last=last and way not in ("alone", "clip-before-reduce")):
                yield

        return micro_step

    @instead(ddp, "materialise")
    def _(original: Any) -> Any:
        def materialise(module: Any, *args: Any) -> None:
            original(module, *args)
            if way == "trains-bf16-weights":
                module.to(torch.bfloat16)

        return materialise

    @instead(optim, "lr")
    def _(original: Any) -> Any:
        def lr(cfg: Any, step: int, total: int) -> float:
            return original(cfg, step * (dist.get_world_size() if way == "lr-per-rank" else 1), total)

        return lr

    @instead(accelerate.Accelerator, "__init__")
    def _(original: Any) -> Any:
        def init(self: Any, *args: Any, **options: Any) -> None:
            original(self, *args, **{**options, **({"cpu": True} if way == "ignored-plugin" else {})})

        return init

    @instead(fsdp2, "fully_shard")
    def _(original: Any) -> Any:
        return lambda *args, **options: None if way == "not-sharded" else original(*args, **options)

    @instead(fsdp2, "MixedPrecisionPolicy")
    def _(original: Any) -> Any:
        def policy(**options: Any) -> Any:
            if way == "reduces-in-bf16":
                del options["reduce_dtype"]
            return original(**options)

        return policy

    @instead(zero.Zero, "settings")
    def _(original: Any) -> Any:
        def settings(self: Any) -> dict[str, Any]:
            made = original(self)
            if way == "clip-left-out":
                del made["gradient_clipping"]
            if way == "sums-in-bf16":
                del made["data_types"]
            if way == "accumulates-once-more":
                made["gradient_accumulation_steps"] += 1
                del made["train_batch_size"]
            return made

        return settings

    @instead(exact.Exact, "_exchange")
    def _(original: Any) -> Any:
        def exchange(self: Any) -> Any:
            if way != RANK_ORDER:
                return original(self)
            own = self.tree.total()
            for value in own:
                parts = [torch.empty_like(value) for _ in range(self.procs.world_size)]
                dist.all_gather(parts, value)
                value.copy_(sum(parts))
            return own

        return exchange
