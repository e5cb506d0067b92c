"""How long a step takes and what a run costs. Arithmetic only; imports no torch.

Owns: `Machine` (what the hardware can do), `step_time` (seconds of a step by kind of work), and the totals of a run:
hours, energy, dollars.

Does not own: what is computed (`trace.py`), how a step is laid out (`memory.Layout`), the constants (`constants.py`).

Every operator takes the longer of its computation and its traffic, and a start; a section takes the longer of that on the
device and of launching it from Python. Communication and transfers run beside computation, as far as they can.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from train.plan import constants
from train.plan.constants import SPEED, Card, Speed
from train.plan.memory import Layout
from train.plan.shapes import Op, Phase, Section, Trace

MFU_FORMULA = (
    "model FLOPs (matrix products, convolutions and attention of forward and backward as traced; attention in full, without "
    "the causal half; nothing that is recomputed) / (devices x data-sheet peak in the precision of compute x step time)"
)


@dataclass(frozen=True)
class Machine:
    """The hardware as the planner sees it. Bandwidths are one direction, in bytes per second."""

    card: Card
    device: str = "cuda"
    devices: int = 1  # per node
    nodes: int = 1
    memory_bytes: float = 0.0  # of one device, usable
    intra: float = 25e9
    inter: float = 25e9  # of a node
    host_bytes: float = 0.0  # of one host
    host_bandwidth: float | None = None  # of its memory; None: what the card's usual host has
    pcie: float = 20e9
    nvme: float = 3e9
    usd_per_device_h: float | None = None
    watts_per_device: float | None = None

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes


def productive(machine: Machine) -> float:
    """The share of a run's time that goes into steps; the rest is failures, restarts, evaluation and checkpoints."""
    return constants.PRODUCTIVE_NODES if machine.nodes > 1 else constants.PRODUCTIVE_ONE_NODE


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by kind of work; they add up to `seconds`."""

    parts: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0  # model FLOPs of one rank (see MFU_FORMULA)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(trace: Trace, layout: Layout, machine: Machine, speed: Speed = SPEED) -> Step:
    """The time of a step of every rank, under `layout` on `machine`."""
    compute = computing(
        trace,
        layout.micro_batch,
        layout.checkpointing,
        layout.compile,
        layout.quantised,
        machine.card,
        machine.device,
        speed,
    )
    parts = {name: value * layout.accumulation for name, value in compute.parts.items()}
    backward = compute.backward
    exposed = communication(trace, layout, machine, speed, compute.seconds, backward)
    if exposed > 0:
        parts["communication not hidden"] = exposed
    parts["optimizer"] = updating(trace, layout, machine, speed)
    transfer = transferring(trace, layout, machine, compute.seconds)
    if transfer > 0:
        parts["offload not hidden"] = transfer
    return Step(parts, layout.accumulation * trace.flops(layout.micro_batch))


# --------------------------------------------------------------------------------------------------------------------
# Computation
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """A micro-step's computation."""

    parts: dict[str, float]
    backward: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@lru_cache(maxsize=4096)
def computing(
    trace: Trace,
    micro_batch: int,
    checkpointing: int,
    compiled: str,
    quantised: bool,
    card: Card,
    device: str,
    speed: Speed,
) -> Compute:
    """Forward, backward and recomputation of one micro-batch."""
    parts = {
        "matrix products": 0.0,
        "attention": 0.0,
        "memory traffic": 0.0,
        "kernel launches": 0.0,
        "recomputation": 0.0,
    }
    backward_total = 0.0
    blocks = 0
    for section in trace.sections:
        fused = compiled != "none" and (section.name == "block" or compiled == "all")
        forward = _phase(section, section.forward, micro_batch, fused, False, card, device, speed)
        backward = _phase(section, section.backward, micro_batch, fused, True, card, device, speed)
        again, repeated = 0, forward
        if section.name == "block":
            if checkpointing:
                repeated = _phase(
                    section,
                    replace(section.forward, ops=tuple(replace(o, count=o.again) for o in section.forward.ops)),
                    micro_batch,
                    fused,
                    False,
                    card,
                    device,
                    speed,
                )
                again = len([i for i in range(blocks, blocks + section.repeat) if i % checkpointing == 0])
            blocks += section.repeat
        if quantised and section.name == "block":
            unpack = (
                sum(p.numel for p in section.params if p.matrix and not p.trainable)
                * 2.5
                / (card.bandwidth_gb_s * 1e9 * speed.bandwidth)
            )
            forward["memory traffic"] += unpack
            backward["memory traffic"] += unpack
        for name in ("matrix products", "attention", "memory traffic", "kernel launches"):
            parts[name] += section.repeat * (forward[name] + backward[name])
        parts["recomputation"] += again * sum(repeated.values())
        backward_total += section.repeat * sum(backward.values()) + again * sum(repeated.values())
    return Compute(parts, backward_total)


def _phase(
    section: Section, phase: Phase, micro_batch: int, fused: bool, backward: bool, card: Card, device: str, speed: Speed
) -> dict[str, float]:
    """Seconds of one pass of a section, by kind."""
    found = {"matrix products": 0.0, "attention": 0.0, "memory traffic": 0.0}
    bandwidth = card.bandwidth_gb_s * 1e9 * speed.bandwidth
    hopper = card.generation in ("hopper", "blackwell")
    launches = 0
    for op in phase.ops:
        if op.kind == "memory":
            if not fused:
                found["memory traffic"] += op.count * (op.bytes(micro_batch) / bandwidth + speed.kernel_s)
            launches += 0 if fused else op.count
            continue
        launches += op.count
        peak = (card.half_tflops if op.half else card.full_tflops) * 1e12
        flops = op.flops(micro_batch)
        if op.kind == "attention":
            rate = peak * (speed.attention_hopper if hopper else speed.attention)
            done = (
                flops * (0.5 if op.causal else 1.0) * (1.25 if backward else 1.0)
            )  # the backward computes scores again
            name = "attention"
        else:
            rate = peak * (speed.matmul_hopper if hopper else speed.matmul) / _narrowness(op, micro_batch, speed)
            done, name = flops, "matrix products"
        found[name] += op.count * (max(done / rate, op.bytes(micro_batch) / bandwidth) + speed.kernel_s)
    if fused:
        found["memory traffic"] = phase.fused(micro_batch) / bandwidth + launches * speed.kernel_s
        launches *= 2
    launch = launches * speed.launch_s if device == "cuda" else 0.0
    found["kernel launches"] = max(0.0, launch - sum(found.values()))
    return found


def _narrowness(op: Op, micro_batch: int, speed: Speed) -> float:
    """How much longer a product takes for having short sides: tiles at its edges, and little to do per tile."""
    return 1.0 + speed.narrow * sum(1.0 / max(1.0, side(micro_batch)) for side in op.shape)


# --------------------------------------------------------------------------------------------------------------------
# Communication, the update, transfers
# --------------------------------------------------------------------------------------------------------------------


def _collective(size: float, machine: Machine, speed: Speed, calls: int) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes (whole) in `calls` pieces."""
    if machine.ranks == 1:
        return 0.0
    within = size * (machine.devices - 1) / machine.devices / (machine.intra * speed.link)
    between = size * (machine.nodes - 1) / machine.nodes / (machine.inter * speed.link)
    return max(within, between) + calls * speed.rank_s * (1 + (machine.nodes > 1))


def communication(
    trace: Trace, layout: Layout, machine: Machine, speed: Speed, compute: float, backward: float
) -> float:
    """Seconds of a step that ranks wait for each other's data. compute, backward: of one micro-step."""
    if machine.ranks == 1:
        return 0.0
    half = 2 if trace.precision != "fp32" else 4
    trainable = trace.numel(trainable=True)
    blocks = sum(s.repeat for s in trace.sections if s.name == "block") or 1
    reduce_bytes = (2 if layout.pure else 4) * trainable

    def exposed(time: float, window: float) -> float:
        return max(0.0, time - speed.overlap * window)

    buckets = max(1, int(4 * trainable / layout.bucket_bytes))
    if layout.strategy == "ddp":
        return exposed(2 * _collective(4.0 * trainable, machine, speed, buckets), backward)
    if layout.strategy in ("zero1", "zero2"):
        reductions = layout.accumulation if layout.strategy == "zero2" else 1
        reduced = reductions * exposed(_collective(4.0 * trainable, machine, speed, buckets), backward)
        return reduced + _collective(half * trainable, machine, speed, buckets)
    gathered = (0.55 if layout.quantised else half) * trace.numel()
    times = 2 if layout.gathered_twice else 1
    gather = times * _collective(gathered, machine, speed, blocks)
    reduce = _collective(reduce_bytes, machine, speed, blocks)
    return layout.accumulation * exposed(gather + reduce, compute)


def updating(trace: Trace, layout: Layout, machine: Machine, speed: Speed) -> float:
    """Seconds of the update: the norm, the clip, the optimizer; on the device or on the host."""
    numbers = float(trace.numel(trainable=True))
    if layout.strategy in ("fsdp2", "zero1", "zero2", "zero3"):
        numbers /= layout.ranks
    moved = {"adamw": 28.0, "adamw_8bit": 16.0, "sgd": 20.0}[layout.optimizer] + 12.0
    if layout.pure:
        moved /= 2
    if layout.offload in ("cpu", "nvme"):
        return numbers * moved * machine.devices / (machine.host_bandwidth or machine.card.host_gb_s * 1e9)
    return numbers * moved / (machine.card.bandwidth_gb_s * 1e9 * speed.bandwidth)


def transferring(trace: Trace, layout: Layout, machine: Machine, compute: float) -> float:
    """Seconds of a step that wait for the host or NVMe."""
    if layout.offload == "none" and not layout.activation_offload:
        return 0.0
    numbers = trace.numel(trainable=True) / (layout.ranks if layout.strategy != "single" else 1)
    seconds = 0.0
    if layout.offload == "paged":
        seconds += numbers * 2 * 2.0 / machine.pcie
    elif layout.offload != "none":
        seconds += numbers * (4.0 + 2.0) / machine.pcie  # gradients go, weights come back
        if layout.offload == "nvme":
            seconds += numbers * machine.devices * 24.0 / machine.nvme
        if layout.offload_parameters:
            seconds += layout.accumulation * max(0.0, 2 * 2.0 * trace.numel() / layout.ranks / machine.pcie - compute)
    return seconds
