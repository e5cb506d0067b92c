"""Where the model is wrapped: processes, and one interface over every engine.

Owns: the process group and its few collectives (`Processes`), and `Strategy`: how a model is placed and wrapped, how a
gradient is accumulated, reduced, clipped and applied, which ranges of which state this rank owns, and what is really in
force. This package is the only place that says DDP, FSDP or DeepSpeed.

Does not own: what is computed (tasks), the optimizer's settings (`train.optim` hands them in), files (`train.checkpoint`).

The one convention that all engines share: `main.py` calls `backward(loss_sum * strategy.scale / count)`, where `count` is
taken over the whole global batch. DDP, FSDP2 and DeepSpeed all average gradients over the W ranks, so `scale` is W for
them and 1 where nothing is averaged. Nothing else divides.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import Config, ConfigError
from train.strategy import eight_bit

if TYPE_CHECKING:
    from torch.optim import Optimizer

log = logging.getLogger(__name__)

STRATEGIES = {
    "single": ("train.strategy.single", "Single"),
    "ddp": ("train.strategy.ddp", "DDP"),
    "fsdp2": ("train.strategy.fsdp2", "FSDP2"),
    "zero1": ("train.strategy.zero", "Zero"),
    "zero2": ("train.strategy.zero", "Zero"),
    "zero3": ("train.strategy.zero", "Zero"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFinite(Exception):
    """All ranks saw a non-finite loss or gradient in the same step, before the update; nothing was changed."""


class Mismatch(Exception):
    """What is in force is not what was asked (law 5)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; a CPU's allocator says so in words only."""
    words = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and words)


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Processes:
    """The ranks of this run and the few things they say to each other. Control traffic is on the CPU (gloo), also where
    gradients go over NCCL, so that no control message waits for a device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    owns_group: bool = False  # made the process group, and so destroys it

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; any device, any dtype that adds."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Run `make` on the main process; every rank returns its (JSON) value, or raises its error.

        Bytes of JSON travel, not pickles: nothing that arrives here can execute.
        """
        if self.world_size == 1:
            return make()
        failure: BaseException | None = None
        payload: dict[str, Any] = {}
        if self.is_main:
            try:
                payload = {"value": make()}
            except Exception as error:  # every rank must learn of it, or the others wait for ever
                failure, payload = error, {"error": f"{type(error).__name__}: {error}"}
        text = json.dumps(payload).encode() if self.is_main else b""
        length = torch.tensor([len(text)], dtype=torch.int64)
        dist.broadcast(length, 0)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, 0)
        if failure is not None:
            raise failure
        payload = json.loads(bytes(data.tolist()))
        if "error" in payload:
            raise MainFailed(payload["error"])
        return payload["value"]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's (JSON) value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        text = json.dumps(value).encode()
        length = torch.tensor([len(text)], dtype=torch.int64)
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        data = torch.zeros(longest, dtype=torch.uint8)
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = [torch.zeros_like(data) for _ in range(self.world_size)]
        dist.all_gather(rows, data)
        return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def close(self) -> None:
        """Leave the group. Skipping it aborts a finished process now and then at exit."""
        if self.owns_group:
            dist.destroy_process_group()


class MainFailed(Exception):
    """The main process failed while the others waited for its answer; it reports the error itself."""


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Stop glibc from giving every large block back to the kernel only to fault it in again at the next step: that is a
    quarter of a small model's step. What other C libraries do is left as it is."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def start(cfg: Config) -> Processes:
    """Join the process group that the launcher laid out, and settle device, threads and the foreign environment.

    Raises ConfigError when the launcher's world does not go with the strategy that was asked.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    name = resolve(cfg, world_size)
    if name == "single" and world_size > 1:
        raise ConfigError(
            [f"strategy=single runs on one process; {world_size} were started. Use strategy=ddp, or start one."]
        )
    if world_size > cfg.train.global_batch_size:
        raise ConfigError(
            [
                f"{world_size} ranks for train.global_batch_size={cfg.train.global_batch_size}: a rank needs at least one "
                f"sample. Start at most {cfg.train.global_batch_size} processes, or raise train.global_batch_size."
            ]
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    _neutralise_environment(cfg, name)

    wanted = cfg.hardware.device
    kind = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            ["hardware.device=cuda, but torch finds no CUDA device. Use hardware=cpu or hardware.device=auto."]
        )
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        if cfg.hardware.memory_gib is not None:  # a bigger card behaves like the tier that was asked
            total = torch.cuda.get_device_properties(device).total_memory / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.hardware.memory_gib / total), device)
    if kind == "cpu":
        _keep_freed_memory()
        if cfg.numerics == "exact":
            torch.set_num_threads(1)  # the split of a sum over threads is part of its bits
        else:
            # Two ranks with two threads each on two cores do not run at half speed but at a tenth. One process takes
            # every core, unless it was told otherwise: `accelerate launch` says 1 to whoever said nothing.
            said = os.environ.get("OMP_NUM_THREADS")
            unsaid = said is None or (said == "1" and by_accelerate)
            if unsaid or world_size > 1:
                torch.set_num_threads(max(1, cores() // local_world))
    if cfg.numerics == "exact":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    procs = Processes(rank, local_rank, world_size, device)
    if world_size > 1:
        _join(cfg, procs)
    return procs


def _join(cfg: Config, procs: Processes) -> None:
    """Be in a process group: of one too, where an engine needs it."""
    rank, world_size = procs.rank, procs.world_size
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if procs.device.type == "cuda" else "gloo"
        slack = 300.0  # the watchdog is to come first: it knows which rank is behind
        timeout = datetime.timedelta(seconds=max(cfg.run.startup_timeout_s, cfg.run.step_timeout_s) + slack)
        dist.init_process_group(
            backend, store=_store(rank, world_size), rank=rank, world_size=world_size, timeout=timeout
        )
        procs.owns_group = True
    if dist.get_world_size() != world_size:  # the silent disaster: each rank training alone
        raise Mismatch(f"the launcher started {world_size} processes, but the group has {dist.get_world_size()}")


def resolve(cfg: Config, world_size: int) -> str:
    """The engine's name: without a plan, `auto` is single on one rank and ddp on more."""
    name = cfg.strategy.name
    return name if name != "auto" else "single" if world_size == 1 else "ddp"


def _store(rank: int, world_size: int) -> dist.Store:
    """The rendezvous store. An elastic agent's own store outlives a restart, and torch does not prefix it per attempt:
    restarted ranks would read the addresses of the dead ones. So each attempt gets a prefix."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=rank == 0 and not agent
    )
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


# `accelerate launch` exports most of its variables always, in these words where nothing was set.
_UNSET = {"no", "false", "default", "none"}
# Of a launch with --use_deepspeed, or about processes and loading: they choose nothing that the config chooses.
_HARMLESS = ("ACCELERATE_USE_CPU", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE",
             "ACCELERATE_USE_IPEX", "ACCELERATE_USE_XPU", "ACCELERATE_DEEPSPEED_ZERO3_", "ACCELERATE_DEEPSPEED_MOE_")  # fmt: skip


def _neutralise_environment(cfg: Config, name: str) -> None:
    """Take Accelerate's variables out of the environment: the engine, its precision and its accumulation come from the
    config alone. What a user's saved `accelerate config` would have changed is named once."""
    s, zero = cfg.strategy, name.startswith("zero")
    same = {
        "ACCELERATE_MIXED_PRECISION": cfg.train.precision,
        "ACCELERATE_USE_FSDP": "true" if name == "fsdp2" else "",
        "FSDP_VERSION": "2" if name == "fsdp2" else "",
        "ACCELERATE_USE_DEEPSPEED": "true" if zero else "",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": name[-1] if zero else "",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": s.offload,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": s.offload if s.offload_parameters else "",
        "ACCELERATE_GRADIENT_CLIPPING": str(cfg.optim.clip),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # which is what is exported where none were asked for
    }
    foreign = []
    for key in [k for k in os.environ if k.startswith(("ACCELERATE_", "FSDP_"))]:
        value = os.environ.pop(key)
        if value.lower() not in (*_UNSET, same.get(key)) and not key.startswith(_HARMLESS):
            foreign.append(f"{key}={value}")
    if foreign and os.environ.get("RANK", "0") == "0":
        log.warning("ignored %s (from an accelerate config or the environment): the config decides, strategy=%s "
                    "strategy.offload=%s train.precision=%s optim.clip=%s", ", ".join(sorted(foreign)), name, s.offload,
                    cfg.train.precision, cfg.optim.clip)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Strategy
# --------------------------------------------------------------------------------------------------------------------

Values = Callable[[str], Tensor | None]  # parameter name -> its whole initial value on the CPU; None: is in place
MakeOptimizer = Callable[[dict[str, Any]], "Optimizer"]  # trainable parameters by name -> optimizer over them
Read = Callable[[str, str, int, int], Tensor]  # (name, kind, start, numel) -> flat fp32 values from a checkpoint


class Strategy:
    """One engine around one model. Subclasses say how; `main.py` and `checkpoint.py` see only this.

    `model` is what a task calls; `module` is the same without the engine's wrapper, with the parameter names that
    checkpoints use. `shapes` are the unsharded shapes of the trainable parameters, in the model's order.
    """

    replicated = True  # every rank holds the whole state

    def __init__(self, cfg: Config, name: str, procs: Processes, precision: str) -> None:
        self.cfg, self.name, self.procs, self.precision = cfg, name, procs, precision
        self.scale = float(procs.world_size)
        self.micro_batch_size = micro_batch_size(cfg, procs.world_size)
        self.model: Any
        self.module: nn.Module
        self.optimizer: Optimizer
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}  # second names of tied parameters -> the first
        self._loss: Tensor | None = None
        self.ema: dict[str, Tensor] = {}  # name -> moving average of what this rank owns of the master

    @property
    def settles(self) -> bool:
        """Whether the engine arranges itself by its first backward pass, so that the one after a resume is another."""
        return False

    # -- wrapping

    def prepare(
        self, module: nn.Module, values: Values, blocks: list[nn.Module], make_optimizer: MakeOptimizer
    ) -> None:
        """Place, fill and wrap `module` (on the meta device where it has no weights yet), then build the optimizer.

        blocks: the repeated layers, for activation checkpointing, compilation and sharding.
        """
        self.module = module
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
        first = {id(p): n for n, p in module.named_parameters()}
        everywhere = module.named_parameters(remove_duplicate=False)
        self.aliases = {n: first[id(p)] for n, p in everywhere if n != first[id(p)] and p.requires_grad}
        self.four_bit = {n for n, p in module.named_parameters() if hasattr(p, "quant_state")}
        s = self.cfg.strategy
        if not blocks and (s.activation_checkpointing or s.activation_offload or s.compile):
            what = "activation_checkpointing, activation_offload and compile work block by block"
            raise ConfigError([f"strategy.{what}, and {self.cfg.model.name} has no repeated blocks; leave them off."])
        for block in blocks[:: s.activation_checkpointing] if s.activation_checkpointing else []:
            checkpoint_activations(block)
        for block in blocks if s.activation_offload else []:
            offload_activations(block)
        self.wrap(values, blocks)
        if s.compile:
            for block in blocks:  # by block: one small graph is compiled, not one per layer
                block.compile()
        self.build_optimizer(make_optimizer)
        if self.cfg.optim.ema is not None:
            self.ema = {n: t.clone() for n, kind, _, t in self._masters() if kind == "master"}
        self._observe()
        self._first_buffers = {n: b.detach().clone() for n, b in persistent_buffers(module)}

    def wrap(self, values: Values, blocks: list[nn.Module]) -> None:
        raise NotImplementedError

    def build_optimizer(self, make_optimizer: MakeOptimizer) -> None:
        self.optimizer = make_optimizer(self.trainable())

    def trainable(self) -> dict[str, Any]:
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    # -- one step

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the run's precision over fp32 weights; norm statistics, softmax and loss stay in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.procs.device.type, DTYPES[self.precision])

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch; gradients are reduced in the last one only."""
        with self.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        """loss: this micro-batch's loss_sum x scale / count, fp32 scalar."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        loss.backward()

    def take_loss(self) -> Tensor:
        """This rank's share of the step's mean loss; the shares of all ranks add up to it. No communication."""
        assert self._loss is not None, "no micro-batch since the last step"
        share, self._loss = self._loss / self.scale, None
        return share

    def step(self, lr: float) -> Tensor | None:
        """Reduce what is left, agree that all is finite, clip, update, clear. Returns the gradient norm before clipping
        (fp32 scalar on the device), or None when the step was skipped.

        Raises NonFinite, on every rank, before anything was changed.
        """
        norm = self.grad_norm()
        if self.optimizer.defaults.get("fused") and self.cfg.numerics == "fast" and self.cfg.train.nonfinite == "stop":
            # The kernel itself leaves weights and state alone when this is 1, so the host need not wait for the device in
            # every step; it learns of it when the metrics are fetched (`judge`), which ends the run. A step that is skipped
            # while the run goes on is known at once: the ledger and the moving average have to know.
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        elif not self.finite(norm):
            return None
        if self.cfg.optim.clip is not None:
            coefficient = torch.clamp(self.cfg.optim.clip / (norm + 1e-6), max=1.0)
            gradients = [local(p.grad) for p in self.trainable().values() if p.grad is not None]
            torch._foreach_mul_([g for g in gradients if g.numel()], coefficient)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update_ema()
        return norm

    def grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self.trainable().values() if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        return torch.linalg.vector_norm(torch.stack(norms))

    def finite(self, norm: Tensor) -> bool:
        """Whether to update. The norm is the same on all ranks, so all of them decide the same."""
        if math.isfinite(norm.item()):
            return True
        self.optimizer.zero_grad(set_to_none=True)
        self.judge(norm.item())
        return False

    def judge(self, norm: float | None) -> None:
        """Apply `train.nonfinite` to the gradient norm of a step; None is a step that was skipped. Raises NonFinite."""
        if norm is not None and not math.isfinite(norm) and self.cfg.train.nonfinite == "stop":
            raise NonFinite(f"gradient norm {norm}")

    def update_ema(self) -> None:
        if self.ema and self.cfg.optim.ema is not None:
            masters = {n: t for n, kind, _, t in self._masters() if kind == "master"}
            torch._foreach_lerp_(list(self.ema.values()), [masters[n] for n in self.ema], 1.0 - self.cfg.optim.ema)

    # -- owned ranges

    def kinds(self) -> list[str]:
        """Kinds of state each trainable parameter has: its master and the optimizer's moments."""
        moments = {
            "adamw": ["exp_avg", "exp_avg_sq"],
            "adamw_8bit": ["exp_avg", "exp_avg_sq"],
            "sgd": ["momentum_buffer"],
        }
        if self.cfg.optim.name == "sgd" and not self.cfg.optim.momentum:
            return ["master"]
        return ["master", *moments[self.cfg.optim.name]]

    def held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(name, kind, start, live flat tensor) of everything this rank holds, whoever shares it."""
        for name, p in self.trainable().items():
            start, piece = self.piece(p)
            if piece.numel() == 0:
                continue
            yield name, "master", start, piece.detach().view(-1)
            state = self.state(p)
            for kind in self.kinds()[1:]:
                yield name, kind, start, local(state[kind]).view(-1)
            if name in self.ema:
                yield name, "ema", start, self.ema[name].view(-1)

    def _masters(self) -> Iterator[tuple[str, str, int, Tensor]]:
        for name, p in self.trainable().items():
            start, piece = self.piece(p)
            if piece.numel():
                yield name, "master", start, piece.detach().view(-1)

    def piece(self, p: Tensor) -> tuple[int, Tensor]:
        """(start in the flattened parameter, this rank's contiguous piece of it)."""
        return 0, p

    def state(self, p: Tensor) -> dict[str, Any]:
        """The optimizer's state of `p`, made if the first step has not made it yet (optimizers are lazy)."""
        if self.cfg.optim.name == "adamw_8bit":
            return eight_bit.moments(self.optimizer, p)
        state = self.optimizer.state[p]
        for kind in self.kinds()[1:]:
            if state.get(kind) is None:
                state[kind] = torch.zeros_like(p)
        if self.cfg.optim.name == "adamw" and "step" not in state:
            state["step"] = torch.zeros((), device=p.device if self.optimizer.defaults.get("fused") else "cpu")
        return state

    def owned(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(name, kind, start, live flat tensor) of this rank's share: over all ranks the shares tile each parameter.

        Where every rank holds everything, the flattened model is cut into W equal runs, so that all write alike.
        """
        if not self.replicated or self.procs.world_size == 1:
            yield from self.held()
            return
        total = sum(math.prod(s) for s in self.shapes.values())
        low, high = (total * r // self.procs.world_size for r in (self.procs.rank, self.procs.rank + 1))
        offset, offsets = 0, {}
        for name, shape in self.shapes.items():
            offsets[name] = offset
            offset += math.prod(shape)
        for name, kind, _, tensor in self.held():
            a, b = max(low - offsets[name], 0), min(high - offsets[name], tensor.numel())
            if a < b:
                yield name, kind, a, tensor[a:b]

    def load(self, read: Read, step: int, kinds: list[str]) -> None:
        """Fill this rank's state from `read`, at `step`; then rebuild what derives from it and assert every counter.

        kinds: what the checkpoint holds; a moving average that it lacks starts from the masters.
        """
        with torch.no_grad():
            for name, kind, start, tensor in self.held():
                self.put(name, kind, tensor, read(name, kind if kind in kinds else "master", start, tensor.numel()))
        self.loaded(step)
        wrong = {n: c for n, c in self.counters().items() if c != step}
        if wrong:
            raise Mismatch(f"after loading step {step}, the optimizer counts {wrong}")

    def put(self, name: str, kind: str, live: Tensor, value: Tensor) -> None:
        """Write one range of state. live: what `held` gave for it."""
        if self.cfg.optim.name == "adamw_8bit" and kind in self.kinds()[1:]:
            eight_bit.store(self.optimizer, self.trainable()[name], kind, value)
        else:
            live.copy_(value)

    def loaded(self, step: int) -> None:
        """Set counters; rebuild compute weights from masters."""
        for p in self.trainable().values():
            count = self.optimizer.state[p].get("step")
            if count is not None:
                self.optimizer.state[p]["step"] = step if isinstance(count, int) else count.fill_(float(step))

    def forget(self) -> None:
        """Undo a step that was made at a learning rate of 0: the masters never moved; moments and counters begin anew."""
        with torch.no_grad():
            for name, kind, _, live in self.held():
                if kind in self.kinds()[1:]:
                    self.put(name, kind, live, torch.zeros_like(live))
        self.loaded(0)
        for seen in (self._seen or {}).values():
            seen.clear()

    def counters(self) -> dict[str, int]:
        """The optimizer's own step counters, by parameter."""
        return {
            n: int(self.optimizer.state[p]["step"])
            for n, p in self.trainable().items()
            if "step" in self.optimizer.state[p]
        }

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average (if there is one)."""
        masters = {n: t for n, _, _, t in self._masters()}
        with torch.no_grad():
            self._swap_ema(masters)
            try:
                yield
            finally:
                self._swap_ema(masters)

    def _swap_ema(self, masters: dict[str, Tensor]) -> None:
        for name, average in self.ema.items():
            kept = masters[name].clone()
            self.put(name, "master", masters[name], average.view(-1))
            average.view(-1).copy_(kept)
        if self.ema:
            self.refresh()

    def refresh(self) -> None:
        """Rebuild compute weights from the masters, where they are not the same tensor."""

    # -- asked and got

    def in_force(self) -> dict[str, Any]:
        """What runs, read from the live objects; the keys of `result.json`'s `engine`."""
        parameters = dict(self.module.named_parameters())
        four_bit = [parameters[n] for n in sorted(self.four_bit)]
        trained = dtypes(p.dtype for p in self.trainable().values())
        return {
            "strategy": self.name_in_force(),
            "offload": "none",
            "offload_parameters": False,
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "zero_stage": 0,
            "precision": self.precision,
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": micro_steps(self.cfg, self.procs.world_size, self.micro_batch_size),
            "clip": self.cfg.optim.clip,
            "numerics": self.cfg.numerics,
            "model_class": type(self.model).__name__,
            "optimizer_class": type(self.optimizer).__name__,
            "parameter_dtype": trained,
            # The parameter is the master, and its gradient has its dtype; engines where that is not so say otherwise.
            **dict.fromkeys(("master_dtype", "accumulation_dtype", "reduce_dtype"), trained),
            "optimizer_swapper": None,
            "local_bytes": sum(map(size, parameters.values())),
            "local_bytes_at_most": sum(p.numel() * p.element_size() for p in parameters.values()),
            "four_bit_bytes": sum(map(size, four_bit)) or None,
            "four_bit_unsharded_bytes": sum(p.numel() * p.element_size() for p in four_bit) or None,
            "device": str(self.procs.device),
            "threads": torch.get_num_threads() if self.procs.device.type == "cpu" else None,
        }

    def name_in_force(self) -> str:
        raise NotImplementedError

    def asked(self) -> dict[str, Any]:
        """What `in_force` has to say of the same keys."""
        s = self.cfg.strategy
        return {"strategy": self.name, "world_size": self.procs.world_size, "precision": self.precision,
                "zero_stage": int(self.name[-1]) if self.name.startswith("zero") else 0,
                "offload": s.offload, "offload_parameters": s.offload != "none" and s.offload_parameters,
                "micro_batch_size": self.micro_batch_size, "clip": self.cfg.optim.clip,
                "gradient_accumulation_steps": micro_steps(self.cfg, self.procs.world_size, self.micro_batch_size),
                "accumulation_dtype": "float32", "reduce_dtype": "float32", "master_dtype": "float32"}  # fmt: skip

    def check(self) -> dict[str, Any]:
        """Compare what is in force with what was asked; return both. Raises Mismatch, naming every difference."""
        got, asked = self.in_force(), self.asked()
        wrong = [f"{k}: asked {v}, got {got[k]}" for k, v in asked.items() if got[k] != v]
        if got["local_bytes"] > got["local_bytes_at_most"]:
            wrong.append(
                f"local bytes: {got['local_bytes_at_most']:,} of the parameters at most, got {got['local_bytes']:,}"
            )
        if (got["optimizer_swapper"] is not None) != (self.cfg.strategy.offload == "nvme"):
            wrong.append(
                f"offload: asked {self.cfg.strategy.offload}, the optimizer's swapper is {got['optimizer_swapper']}"
            )
        covered = got["micro_batch_size"] * got["gradient_accumulation_steps"] * got["world_size"]
        if covered < self.cfg.train.global_batch_size:
            wrong.append(
                f"batch: {covered} samples a step for train.global_batch_size={self.cfg.train.global_batch_size}"
            )
        if wrong:
            raise Mismatch("; ".join(wrong))
        return {**got, "asked": asked}

    def changed_buffers(self) -> list[str]:
        """Names of persistent buffers that are not what they were when the run began: no checkpoint holds them."""
        return [n for n, b in persistent_buffers(self.module) if not torch.equal(b, self._first_buffers[n])]

    def _observe(self) -> None:
        """Watch what goes through the model until the first update: engines hold neither the batch that they really get nor,
        under autocast, the precision that they multiply in."""
        self._seen: dict[str, list[Any]] | None = {"batch": [], "dtype": []}
        seen = self._seen

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen["batch"].append(next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

        def multiplied(module: nn.Module, args: Any, output: Tensor) -> None:
            seen["dtype"].append(output.dtype)

        self._hooks = [self.module.register_forward_pre_hook(entered, with_kwargs=True)]
        product = next((m for m in self.module.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)
        if product is not None and not self.cfg.strategy.compile:  # a hook in a compiled block would split its graph
            self._hooks.append(product.register_forward_hook(multiplied))

    def check_step(self, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Before the first update: what went through the model is what was asked, and no two ranks had the same sample.
        Collective then. Returns what was seen; later on, nothing. Raises Mismatch.

        batches: this rank's micro-batches of the step.
        """
        if self._seen is None:
            return {}
        for hook in self._hooks:
            hook.remove()
        seen, self._seen = self._seen, None
        micro, steps = self.micro_batch_size, micro_steps(self.cfg, self.procs.world_size, self.micro_batch_size)
        wrong = []
        if seen["batch"] != [micro] * steps:
            wrong.append(f"batch: asked {steps} micro-batches of {micro}, the model got {seen['batch']}")
        if any(dtype != DTYPES[self.precision] for dtype in seen["dtype"]):
            wrong.append(f"precision: asked {self.precision}, the model multiplies in {dtypes(seen['dtype'])}")
        mine = [key for b in batches for key, w in zip(zip(b["epoch"].tolist(), b["sample"].tolist(), strict=True),
                                                       b["weight"].tolist(), strict=True) if w]  # fmt: skip
        everyone = [tuple(key) for rank in self.procs.gather(mine) for key in rank]
        if twice := len(everyone) - len(set(everyone)):
            wrong.append(f"samples: {twice} of {len(everyone)} went to more than one rank")
        if changed := self.changed_buffers():
            wrong.append(
                f"buffers of the model changed ({', '.join(changed[:3])}): checkpoints hold parameters only. Freeze them "
                "(BatchNorm: keep it in evaluation mode), or make them parameters"
            )
        if wrong:
            raise Mismatch("in the first step, " + "; ".join(wrong))
        return {
            "seen_micro_batches": seen["batch"],
            "seen_dtype": dtypes(seen["dtype"]) or None,
            "seen_samples": len(everyone),
        }

    def close(self) -> None:
        """Release the engine."""


def build(cfg: Config, procs: Processes, precision: str) -> Strategy:
    name = resolve(cfg, procs.world_size)
    if name != "single":
        _join(cfg, procs)
    module, cls = ("train.strategy.exact", "Exact") if cfg.numerics == "exact" else STRATEGIES[name]
    return getattr(importlib.import_module(module), cls)(cfg, name, procs, precision)


def micro_batch_size(cfg: Config, world_size: int) -> int:
    """As set or planned; without a plan a rank's share, at most 8. Exact numerics run one grain."""
    if cfg.numerics == "exact":
        return 1
    share = -(-cfg.train.global_batch_size // world_size)
    return min(cfg.strategy.micro_batch_size or 8, share)


def micro_steps(cfg: Config, world_size: int, micro: int) -> int:
    """Micro-steps of every rank: those of the rank with most work; the others add zero-weight ones."""
    return math.ceil(math.ceil(cfg.train.global_batch_size / world_size) / micro)


def precision_of(cfg: Config, device: torch.device) -> str:
    """`auto` resolved for this device: bf16 where it is native (AVX512-BF16 and AMX count), else fp32."""
    if cfg.train.precision != "auto":
        return cfg.train.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    return "fp32"


def materialise(module: nn.Module, device: torch.device, values: Values) -> None:
    """Give everything that is on the meta device memory on `device` and its value; move what has one already.

    values(name) is None for a parameter that is in place (a 4-bit weight). Tied parameters stay tied.
    """
    placed: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, p in list(owner._parameters.items()):
            if p is None:
                continue
            if id(p) not in placed:
                fresh: Any = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) if p.is_meta else p
                if hasattr(p, "quant_state"):
                    fresh = p.to(device)  # 4 bits, with the scales that belong to them
                elif not p.is_meta:
                    fresh.data = p.data.to(device)
                placed[id(p)] = fresh
            owner._parameters[leaf] = placed[id(p)]
        for leaf, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(device)
    with torch.no_grad():
        for name, p in module.named_parameters():
            value = values(name)
            if value is not None:
                p.copy_(value)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of those that a state dict would hold; made without one, which engines gather for."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def checkpoint_activations(block: nn.Module) -> None:
    """Recompute this block in the backward pass. The RNG state needs no care: dropout is a function of the sample."""
    from torch.utils.checkpoint import checkpoint

    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def offload_activations(block: nn.Module) -> None:
    """Keep what this block saves for the backward pass in host memory meanwhile. Weights stay where they are."""
    forward = block.forward

    def pack(tensor: Tensor) -> Any:
        where = tensor.untyped_storage().data_ptr()
        if any(where == p.untyped_storage().data_ptr() for p in block.parameters()):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: Any) -> Tensor:
        return packed[1].to(packed[0], non_blocking=True) if isinstance(packed, tuple) else packed

    def offloading(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    block.forward = offloading


def dtypes(found: Iterable[torch.dtype | None]) -> str:
    return ",".join(sorted({str(t).removeprefix("torch.") for t in found}))


def size(tensor: Tensor) -> int:
    """Bytes of this rank's part."""
    return local(tensor).numel() * tensor.element_size()


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
