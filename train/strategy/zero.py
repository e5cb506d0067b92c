"""DeepSpeed ZeRO stages 1, 2 and 3, with optimizer state on the device, in host memory or on NVMe.

Owns: DeepSpeed's settings, built from the config with nothing left to "auto" or to a default that changes the result; the
engine through Accelerate; and the private names of DeepSpeed behind which masters and moments lie (every one is asserted
in `tests/test_seams.py`).

Traps that this file closes: `Accelerator(cpu=True)` would drop DeepSpeed and train DDP; without the gloo handler every
rank believes it is rank 0 of 1; a missing `gradient_clipping` clips at 1.0; Accelerate's `backward` also steps; masters
are made from rounded bf16 weights; compute weights are copies of the masters even in fp32.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.strategy import (
    DTYPES,
    MakeOptimizer,
    Mismatch,
    NonFinite,
    Strategy,
    Values,
    dtypes,
    materialise,
    micro_steps,
    set_lr,
)

log = logging.getLogger(__name__)


class Zero(Strategy):
    """DeepSpeed. It averages gradients over ranks, which `scale` undoes; `scale_wrt_gas=False` keeps it from dividing
    by the accumulation steps as well."""

    replicated = False

    @property
    def stage(self) -> int:
        return int(self.name[-1])

    # -- wrapping

    def wrap(self, values: Values, blocks: list[nn.Module]) -> None:
        """Place the weights. The engine needs the optimizer, so it is built in `build_optimizer`."""
        self._accelerator()
        self.values = values
        if self.stage < 3:
            materialise(self.module, self.procs.device, values)
        else:
            self._partition(values)
        if self.precision != "fp32":
            self.module.register_forward_pre_hook(self._cast, with_kwargs=True)

    def _accelerator(self) -> None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        cpu = self.procs.device.type == "cpu"
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        for key, value in {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
        }.items():
            os.environ.setdefault(key, str(value))  # DeepSpeed reads them on one process too
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        handlers = [InitProcessGroupKwargs(backend="gloo")] if cpu else []
        if self.cfg.strategy.offload == "nvme":
            self._nvme().mkdir(parents=True, exist_ok=True)
        self.plugin = DeepSpeedPlugin(hf_ds_config=self.settings())
        self.accelerator = Accelerator(
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            deepspeed_plugin=self.plugin,
            kwargs_handlers=handlers,
        )
        if self.accelerator.distributed_type.value != "DEEPSPEED":
            got = self.accelerator.distributed_type.value
            raise Mismatch(f"strategy: asked {self.name}, got {got}: Accelerate ignored DeepSpeed")
        if self.accelerator.num_processes != self.procs.world_size:
            raise Mismatch(f"Accelerate sees {self.accelerator.num_processes} processes, not {self.procs.world_size}")

    def settings(self) -> dict[str, Any]:
        """DeepSpeed's config, every value explicit."""
        s, ranks = self.cfg.strategy, self.procs.world_size
        steps = micro_steps(self.cfg, ranks, self.micro_batch_size)
        bucket = max(1, int(s.bucket_mb * 2**20) // 4)  # elements
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": self.procs.device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "reduce_scatter": True,
            "round_robin_gradients": False,
        }
        if self.stage == 3:
            zero.update(
                stage3_prefetch_bucket_size=bucket,
                stage3_param_persistence_threshold=s.persistence_threshold,
                stage3_max_live_parameters=int(1e9),
                stage3_max_reuse_distance=int(1e9),
                sub_group_size=int(1e9),
            )
        if s.offload != "none":
            target: dict[str, Any] = {"device": s.offload, "pin_memory": self.procs.device.type == "cuda"}
            if s.offload == "nvme":
                target["nvme_path"] = str(self._nvme())
            zero["offload_optimizer"] = dict(target)
            if s.offload_parameters:
                zero["offload_param"] = dict(target)
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": steps,
            "train_batch_size": self.micro_batch_size * steps * ranks,
            "gradient_clipping": self.cfg.optim.clip or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": True},
            "fp16": {"enabled": self.precision == "fp16", "loss_scale": 0},
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }

    def _nvme(self) -> Path:
        """A place of this run's own: DeepSpeed names its files by rank and parameter only, and clears them when it starts."""
        own = hashlib.sha256(repr(self.cfg).encode()).hexdigest()[:12]
        return Path(self.cfg.hardware.nvme_path or self.cfg.run.root) / "nvme" / own

    def _partition(self, values: Values) -> None:
        """Make, fill and partition one parameter at a time: no rank ever holds the whole model."""
        from deepspeed.runtime.zero import Init

        dtype = DTYPES[self.precision]
        context = Init(
            config_dict_or_path=self.settings(),
            dtype=dtype,
            remote_device="cpu" if self.procs.device.type == "cpu" else None,
        )
        placed: dict[int, nn.Parameter] = {}
        names = {id(p): n for n, p in self.module.named_parameters()}
        for owner in self.module.modules():
            for leaf, buffer in list(owner._buffers.items()):
                if buffer is not None:
                    owner._buffers[leaf] = buffer.to(self.procs.device)
        for owner in self.module.modules():
            for leaf, p in list(owner._parameters.items()):
                if p is None:
                    continue
                if id(p) not in placed:
                    value = values(names[id(p)])
                    assert value is not None  # 4-bit weights are refused under ZeRO by the config
                    # What is partitioned already keeps its dtype: the engine turns the others into its own, and not these.
                    value = value.to(self.procs.device, dtype).clone().view(p.shape)
                    fresh_p = nn.Parameter(value, p.requires_grad)
                    context._convert_to_zero_parameters([fresh_p])
                    placed[id(p)] = fresh_p
                owner._parameters[leaf] = placed[id(p)]

    def _cast(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The engine computes in low precision without autocast, so floating inputs come in that precision."""
        dtype = DTYPES[self.precision]

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return tuple(cast(a) for a in args), {k: cast(v) for k, v in kwargs.items()}

    def build_optimizer(self, make_optimizer: MakeOptimizer) -> None:
        optimizer = make_optimizer(self.trainable())
        if self.procs.is_main:
            self._announce_builds()
        self.engine, _ = self.accelerator.prepare(self.module, optimizer)
        self.model, self.zero = self.engine, self.engine.optimizer
        self.optimizer = self.zero
        if self.precision != "fp32":  # masters were cloned from rounded weights: give them the unrounded values
            self.load(lambda n, k, s, c: self._initial(n, k, s, c), 0, ["master", *self.kinds()[1:]])
        del self.values

    def _announce_builds(self) -> None:
        """Say what DeepSpeed is about to compile, which it does without a word, once for a machine."""
        built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
        needed = {"none": [], "cpu": ["cpu_adam"], "nvme": ["cpu_adam", "async_io"]}[self.cfg.strategy.offload]
        if missing := [op for op in needed if not any(built.glob(f"**/{op}.so"))]:
            log.warning("DeepSpeed compiles %s, once on this machine: a minute or more each", " and ".join(missing))
        for lock in [lock for op in missing for lock in built.glob(f"**/{op}/lock")]:
            log.warning("%s: another process compiles it, or died doing so; then remove that file", lock)

    def _initial(self, name: str, kind: str, start: int, count: int) -> Tensor:
        value = self.values(name) if kind == "master" else None
        return torch.zeros(count) if value is None else value.reshape(-1)[start : start + count].float()

    # -- one step

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the engine's weights are in the run's precision

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor | None:
        """DeepSpeed clips by its own config, and leaves the state alone when the norm that all ranks share is not finite."""
        set_lr(self.zero, lr)
        if self._steps_on_host:
            self._forget_powers()
        self.engine.step()
        if self.zero.overflow:
            if self.cfg.train.nonfinite == "skip":
                return None
            raise NonFinite("gradient norm is not finite")
        self.update_ema()
        return torch.as_tensor(float(self.engine.get_global_grad_norm()))

    @property
    def _steps_on_host(self) -> bool:
        return type(self.zero.optimizer).__name__ == "DeepSpeedCPUAdam"

    def _forget_powers(self) -> None:
        """DeepSpeedCPUAdam keeps beta ** step as a running product, which a resumed run has not: other bits. Another beta in
        between, on a number that nobody uses, makes it take the power of the step anew."""
        one, inner = torch.ones(1), self.zero.optimizer
        inner.ds_opt_adam.adam_update(
            inner.opt_id, 1, 0.0, 0.5, 0.5, 1.0, 0.0, True, one, one.clone(), one.clone(), one.clone()
        )

    # -- owned ranges

    def held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        self._make_state()
        for name, p in self.trainable().items():
            found = self._range(p)
            if found is None:
                continue
            start, count = found
            for kind in self.kinds():
                yield name, kind, start, self._get(p, kind, count)
            if name in self.ema:
                yield name, "ema", start, self.ema[name]

    def _masters(self) -> Iterator[tuple[str, str, int, Tensor]]:
        for name, p in self.trainable().items():
            found = self._range(p)
            if found is not None:
                yield name, "master", found[0], self._get(p, "master", found[1])

    def _range(self, p: Any) -> tuple[int, int] | None:
        """(start, count) of what this rank owns of `p`; None where it owns nothing."""
        if self.stage < 3:
            mapping = p._hp_mapping
            return None if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
        piece = p.partition_numel()
        start = piece * self.procs.rank
        count = min(piece, p.ds_numel - start)
        return (start, count) if count > 0 else None

    def _get(self, p: Any, kind: str, count: int) -> Tensor:
        if self.stage < 3:
            mapping = p._hp_mapping
            found = mapping.get_hp_fragment() if kind == "master" else mapping.get_optim_state_fragment(kind)
            return found.view(-1)
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        found = safe_get_local_fp32_param(p) if kind == "master" else safe_get_local_optimizer_state(p, kind)
        return found.view(-1)[:count]  # the last rank's piece is padded

    def put(self, name: str, kind: str, live: Tensor, value: Tensor) -> None:
        if self.stage < 3 or kind == "ema":
            live.copy_(value)
            return
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        p: Any = self.trainable()[name]
        padded = torch.zeros(p.partition_numel())
        padded[: value.numel()] = value
        if kind == "master":
            safe_set_local_fp32_param(p, padded)
        else:
            safe_set_local_optimizer_state(p, padded, kind)

    def _flat(self) -> list[Tensor]:
        """The flat fp32 tensors that the inner optimizer steps."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # stage 1 in bf16 with fp32 accumulation is another class
            return self.zero.fp32_groups_flat_partition
        return self.zero.single_partition_of_fp32_groups

    def _make_state(self) -> None:
        """The inner optimizer is lazy: before the first step its state is nowhere."""
        inner = self.zero.optimizer
        if not all(inner.state.get(f) for f in self._flat() if f.numel()):
            for flat in self._flat():
                inner.state[flat] = {
                    "step": self._count(0, flat),
                    **{k: torch.zeros_like(flat) for k in self.kinds()[1:]},
                }
        if self.stage < 3:
            # Linked anew each time: DeepSpeed links after the step of its first parameter group, before the second has
            # any state, and then believes that it is done.
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _count(self, step: int, flat: Tensor) -> Any:
        """A step count as the inner optimizer keeps it: a number, or a tensor, for a fused kernel beside what it steps."""
        if self._steps_on_host:
            return step
        fused = self.zero.optimizer.defaults.get("fused")
        return torch.tensor(float(step), device=flat.device if fused else "cpu")

    def loaded(self, step: int) -> None:
        for flat in self._flat():
            if "step" in self.zero.optimizer.state[flat]:
                self.zero.optimizer.state[flat]["step"] = self._count(step, flat)
        self.refresh()

    def refresh(self) -> None:
        """Compute weights are copies of the masters, in fp32 too."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for i, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            if self.zero.fp16_partitioned_groups_flat[i] is not None:
                self.zero.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
                self.zero._unflatten_partitioned_parameters(i)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].partition(self.zero.persistent_parameters)
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def counters(self) -> dict[str, int]:
        states = [self.zero.optimizer.state[f] for f in self._flat()]
        return {f"group {i}": int(state["step"]) for i, state in enumerate(states) if "step" in state}

    # -- asked and got

    def in_force(self) -> dict[str, Any]:
        stage = self.engine.zero_optimization_stage()
        device = _device(self.engine.zero_offload_optimizer())
        # Stage 1 in bf16 is another class, which knows the first and leaves the second to the engine.
        accumulated = getattr(self.zero, "gradient_accumulation_dtype", None) or self.zero.grad_acc_dtype
        reduced = getattr(self.zero, "communication_data_type", self.engine.communication_data_type)
        swapper = getattr(self.zero, "optimizer_swapper", None)
        parameters: list[Any] = list(self.module.parameters())
        held = [getattr(p, "ds_tensor", p) if stage == 3 else p for p in parameters]
        whole = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        share = [-(-n // self.procs.world_size) if self.stage == 3 else n for n in whole]
        return {
            **super().in_force(),
            "world_size": self.engine.dp_world_size,
            "zero_stage": stage,
            "offload": device,
            "offload_parameters": _device(self.engine.zero_offload_param()) == device != "none",
            "gradient_accumulation_steps": self.engine.gradient_accumulation_steps(),
            "micro_batch_size": self.engine.train_micro_batch_size_per_gpu(),
            "clip": self.engine.gradient_clipping() or None,
            "optimizer_class": f"{type(self.zero).__name__}({type(self.zero.optimizer).__name__})",
            "accumulation_dtype": dtypes([accumulated]),
            "reduce_dtype": dtypes([reduced]),
            "master_dtype": dtypes(f.dtype for f in self._flat()),
            "optimizer_swapper": type(swapper).__name__ if swapper is not None else None,
            "local_bytes": sum(p.numel() * p.element_size() for p in held),
            "local_bytes_at_most": sum(n * p.element_size() for n, p in zip(share, parameters, strict=True)),
        }

    def name_in_force(self) -> str:
        if type(self.model).__name__ != "DeepSpeedEngine":
            return type(self.model).__name__
        return f"zero{self.engine.zero_optimization_stage()}"

    def close(self) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        self.accelerator.free_memory()
        if self.cfg.strategy.offload == "nvme" and self.procs.local_rank == 0:
            shutil.rmtree(self._nvme(), ignore_errors=True)
        unset_hf_deepspeed_config()  # transformers would partition the next model of this process while it builds it


def _device(offload: Any) -> str:
    """Where DeepSpeed's offload config moves things to: none, cpu, nvme."""
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))
