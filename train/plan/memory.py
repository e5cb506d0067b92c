"""What each rank and its host hold during a step, under every strategy and lever. Arithmetic only; imports no torch.

Owns: `Layout` (how a step is laid out), `holds` (bytes by name at the moment that needs most), and each strategy's own
terms: what it keeps always, what it gathers for a section, how gradients appear, what an update needs.

Does not own: what a step keeps and computes (`trace.py` measures it), the constants (`constants.py`), time (`time.py`).

The moments of a step. Going forward, each section adds what it keeps for the backward pass and needs its own temporary
peak on top; the loss comes last; going backward the same is released section by section while gradients appear; then the
update. `holds` walks these moments, adds what the strategy holds at each, and reports the largest. The names of its
terms add up to the total.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from train.plan import constants
from train.plan.shapes import Param, Section, Trace

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a step is laid out on ranks; what `strategy` and `optim` say, and what the machine decides."""

    strategy: str = "single"  # single, ddp, fsdp2, zero1, zero2, zero3
    ranks: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: int = 0  # every n-th block is recomputed
    offload: str = "none"
    offload_parameters: bool = False
    activation_offload: bool = False
    compile: str = "none"  # none, blocks, all (the loss too: described, not run)
    optimizer: str = "adamw"
    momentum: bool = True  # sgd
    foreach: bool = False  # the update makes a temporary of every parameter at once
    ema: bool = False
    quantised: bool = False  # frozen matrices of blocks in NF4, doubly quantised
    bucket_bytes: float = 25 * 2**20
    persistence_threshold: int = 100_000
    device: str = "cuda"
    # Described for comparison, never run by this project:
    pure: bool = False  # weights, gradients and moments all in 16 bits
    step_in_backward: bool = False  # each gradient is applied and freed as it appears
    gathered_twice: bool = True  # weights are dropped after the forward pass and gathered again (full sharding)
    flat: bool = False  # FSDP1: a flat parameter per block, frozen ones in it, whole gradients while accumulating
    single_quantisation: bool = False  # NF4 without double quantisation


@dataclass(frozen=True)
class Holding:
    """Bytes of one rank at its peak, by name, and of its share of the host's memory."""

    terms: dict[str, float]
    host: dict[str, float]
    moment: str  # when the peak is reached

    @property
    def allocated(self) -> float:
        """Tensors on the device: what `torch.cuda.max_memory_allocated` would say."""
        return sum(self.terms.values())


def device_overhead(allocated: float, ranks: int, device: str) -> dict[str, float]:
    """What the device holds beyond tensors: what the allocator reserves and cannot use, and the contexts of its libraries."""
    if device != "cuda":
        return {}
    overhead = {
        "allocator reserve": constants.RESERVE_FRACTION * allocated,
        "CUDA context": constants.CUDA_CONTEXT_BYTES,
    }
    if ranks > 1:
        overhead["communication library"] = constants.NCCL_BYTES
    return overhead


# --------------------------------------------------------------------------------------------------------------------
# The moments of a step
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A section going forward or backward: bytes of activations, whatever the strategy."""

    name: str
    section: Section
    index: int  # of the section, counted over repeats, from 0
    backward: bool
    saved: float  # kept by sections so far, this one's own included when going backward
    loss: float  # of these, by the output layer and the loss
    temporary: float  # above them, when gradients exist already
    temporary_fresh: float  # above them, counting the gradients of parameters that appear here


@lru_cache(maxsize=512)
def moments(
    trace: Trace, micro_batch: int, checkpointing: int, compiled: str, offloaded: bool
) -> tuple[tuple[Moment, ...], float]:
    """(the moments of a micro-step, bytes of activations that went to the host). Equal sections in the middle of a stack
    are left out: what they hold lies between what their neighbours hold."""
    sections = list(trace.each())
    blocks = [i for i, s in enumerate(sections) if s.name == "block"]
    again = set(blocks[::checkpointing]) if checkpointing else set()
    shown = _ends(sections)
    found: list[Moment] = []
    kept: list[float] = []
    whole: list[float] = []
    saved = host = 0.0
    for i, s in enumerate(sections):
        eager = s.forward.kept(micro_batch)
        fused = (compiled != "none" and s.name == "block") or (compiled == "all" and s.name == "after")
        whole.append(s.forward.compiled(micro_batch) if fused else eager)  # what is recomputed need not be kept
        if i in shown:
            extra = (
                max(s.forward.peak(micro_batch) - eager + whole[i], whole[i])
                if s.name == "block" or not fused
                else whole[i]
            )
            found.append(Moment(f"forward of {_label(s, i, blocks)}", s, i, False, saved, 0.0, extra, extra))
        own = s.inputs(micro_batch) if i in again else whole[i]
        if offloaded and s.name == "block":
            host, own = host + own, 0.0
        kept.append(own)
        saved += own
    loss = kept[-1] if len(sections) > 1 else 0.0
    for i in reversed(range(len(sections))):
        s = sections[i]
        missing = whole[i] - kept[i]  # comes back by recomputation, or from the host
        if i in shown:
            if compiled == "all" and s.name == "after":
                width = max((p.numel for p in s.params if p.trainable), default=0)
                temporary = [2.0 * 2 * width + s.inputs(micro_batch)] * 2
            else:
                temporary = [missing + max(0.0, s.backward.peak(micro_batch, fresh=fresh)) for fresh in (False, True)]
            if i in again:
                forward = s.forward.peak(micro_batch) - s.forward.kept(micro_batch) + missing
                temporary = [max(t, forward) for t in temporary]
            found.append(Moment(f"backward of {_label(s, i, blocks)}", s, i, True, saved, loss, *temporary))
        saved += s.backward.kept(micro_batch) + s.forward.kept(micro_batch) - kept[i]
        loss = 0.0
    return tuple(found), host


def _ends(sections: list[Section]) -> set[int]:
    """Indices of the first and last of every run of equal sections, and their neighbours within it."""
    shown: set[int] = set()
    for i, s in enumerate(sections):
        same = [j for j in (i - 1, i + 1) if 0 <= j < len(sections) and sections[j] is s]
        if len(same) < 2:
            shown.add(i)
    return shown


def _label(section: Section, index: int, blocks: list[int]) -> str:
    if section.name == "block":
        return f"block {blocks.index(index) + 1} of {len(blocks)}"
    return {
        "before": "the input layers",
        "after": "the output layer and the loss",
        "between": "the layers between blocks",
    }[section.name]


# --------------------------------------------------------------------------------------------------------------------
# What a strategy holds
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _Shape:
    """What all strategies reckon with."""

    trace: Trace
    layout: Layout
    trainable: int
    frozen: float  # bytes of frozen weights as stored
    half: int  # bytes of a number in the precision of compute

    @classmethod
    def of(cls, trace: Trace, layout: Layout) -> _Shape:
        half = 4 if trace.precision == "fp32" else 2
        return cls(
            trace,
            layout,
            trace.trainable,
            summed(trace, layout, lambda p, stored: 0.0 if p.trainable else stored),
            half,
        )

    @property
    def master(self) -> int:
        return 2 if self.layout.pure else 4

    def moments(self) -> float:
        """Bytes of optimizer state per trained number."""
        lay = self.layout
        if lay.optimizer == "sgd":
            return self.master if lay.momentum else 0.0
        if lay.optimizer == "adamw_8bit":
            return 2 + 2 * 4 / constants.BLOCK_8BIT
        return 2 * self.master

    def gathered(self, section: Section, bytes_each: float) -> float:
        """Bytes of a section's parameters when they are whole, 4-bit weights as stored."""
        return section.numel(trainable=True) * bytes_each + sum(
            stored(p, self.trace, self.layout, section) for p in section.params if not p.trainable
        )


def stored(p: Param, trace: Trace, layout: Layout, section: Section) -> float:
    """Bytes of a frozen parameter: in the precision of compute, or 4-bit."""
    if layout.quantised and p.matrix and section.name == "block":
        return p.numel * (constants.NF4_SINGLE_BYTES if layout.single_quantisation else constants.NF4_BYTES)
    return p.numel * (4 if trace.precision == "fp32" else 2)


def summed(trace: Trace, layout: Layout, of: Callable[[Param, float], float]) -> float:
    """The sum over all parameters of `of(parameter, its bytes if it is frozen)`."""
    return sum(s.repeat * sum(of(p, stored(p, trace, layout, s)) for p in s.params) for s in trace.sections)


@dataclass
class _Held:
    """What one strategy holds beside activations."""

    always: dict[str, float]
    computing: dict[str, float] = field(default_factory=dict)  # in forward and backward
    reducing: dict[str, float] = field(default_factory=dict)  # in the backward pass
    updating: dict[str, float] = field(default_factory=dict)  # in the update
    gradient: float = 4.0  # bytes per trained number of gradients that appear section by section; whole where they stay
    whole: bool = False  # gradients exist from the first moment on
    share: float = 1.0  # the part of gradients that a rank keeps
    gather: float = 0.0  # bytes per number of a section that is gathered; 0 where weights are whole
    reduce: float = 0.0  # bytes per trained number of a section whose gradients are being reduced
    ahead: int = 0  # sections gathered ahead
    keeps: float = 0.0  # numbers that stay gathered from their use in the forward pass to that in the backward pass
    host: dict[str, float] = field(default_factory=dict)


def _single(x: _Shape) -> _Held:
    always = {"weights": x.master * x.trainable + x.frozen}
    state = {"optimizer state": x.moments() * x.trainable}
    held = _Held(always, gradient=x.master, whole=x.layout.accumulation > 1)
    (held.host if x.layout.offload == "paged" else held.always).update(state)  # a paged optimizer: described, not run
    return held


def _ddp(x: _Shape) -> _Held:
    """Gradients are views of buckets that exist from the first backward on. While micro-steps are added up without
    reduction they are tensors of their own beside the buckets."""
    held = _single(x)
    held.always["gradient buckets"] = 4.0 * x.trainable
    held.gradient = 4.0 if x.layout.accumulation > 1 else 0.0
    return held


def _fsdp2(x: _Shape) -> _Held:
    """Everything sharded by rows. A block is gathered before it is used and dropped after, the next one gathered meanwhile;
    what lies outside blocks stays gathered from its first use to the end of the backward pass. Each micro-step reduces."""
    n = x.layout.ranks

    def part(p: Param) -> float:
        return math.ceil(p.rows / n) / p.rows

    trainable = summed(x.trace, x.layout, lambda p, _: p.numel * part(p) if p.trainable else 0.0)
    frozen = summed(x.trace, x.layout, lambda p, stored: 0.0 if p.trainable else stored * part(p))
    always = {"weights": x.master * trainable + frozen, "optimizer state": x.moments() * trainable}
    root = sum(s.repeat * x.gathered(s, x.half) for s in x.trace.sections if s.name != "block")
    held = _Held({}, {"gathered weights": root}, gradient=x.master, share=trainable / max(1, x.trainable))
    (held.host if x.layout.offload == "cpu" else held.always).update(always)  # FSDP's offload: described, not run
    held.whole = x.layout.accumulation > 1
    held.gather, held.ahead, held.reduce = float(x.half), 1, float(x.half) + (0.0 if x.layout.pure else 4.0)
    if x.layout.flat and x.layout.accumulation > 1:
        held.always["gradients held whole while accumulating"] = x.half * float(x.trace.numel())
        held.gradient = 0.0
    return held


def _zero12(x: _Shape) -> _Held:
    """Weights whole, masters and optimizer state in W parts of one flat tensor; stage 2 keeps its part of the gradients."""
    lay = x.layout
    part = math.ceil(x.trainable / lay.ranks)
    always = {"weights": x.half * x.trainable + x.frozen}
    state = {"fp32 masters": 0.0 if lay.pure else 4.0 * part, "optimizer state": x.moments() * part}
    host: dict[str, float] = {}
    if lay.offload == "none":
        always |= state
    else:
        host = {**state, "gradients on the host": 4.0 * part}
    # A step that is one micro-step begins with no gradients: they come section by section, stage 2 keeping its part.
    held = _Held(always, host=host, whole=lay.accumulation > 1)
    held.share = part / max(1, x.trainable) if lay.strategy == "zero2" else 1.0
    buckets = 2 if lay.device == "cuda" else 1  # the second one to overlap
    held.reducing = {"gradient buckets": min(buckets * lay.bucket_bytes, 4.0 * x.trainable)}
    return held


def _zero3(x: _Shape) -> _Held:
    """Weights too in W parts; those below the threshold stay whole. What is used again within `max_reuse_distance`, up to
    `max_live_parameters`, is not dropped after the forward pass: a model of fewer numbers is whole by its end."""
    n, lay = x.layout.ranks, x.layout
    part = summed(x.trace, lay, lambda p, _: math.ceil(p.numel / n) if p.trainable else 0.0)
    frozen = summed(x.trace, lay, lambda p, _: 0.0 if p.trainable else math.ceil(p.numel / n) * x.half)
    persistent = summed(x.trace, lay, lambda p, _: p.numel * x.half if p.numel < lay.persistence_threshold else 0.0)
    state = {"fp32 masters": 0.0 if lay.pure else 4.0 * part, "optimizer state": x.moments() * part}
    weights = {"weights": x.half * part + frozen}
    host: dict[str, float] = {}
    always = {"persistent small weights": float(persistent)}
    if lay.offload == "none":
        always |= state
    elif lay.offload == "cpu":
        host |= {**state, "gradients on the host": 4.0 * part}
    (host if lay.offload_parameters else always).update(weights)
    held = _Held(always, host=host, whole=True, share=part / max(1, x.trainable))
    held.gather, held.ahead, held.reduce, held.keeps = float(x.half), 1, float(x.half), LIVE_PARAMETERS
    held.computing = {"gradient buckets": min(2 * lay.bucket_bytes, 4.0 * x.trainable)}
    return held


LIVE_PARAMETERS = 1e9
"""DeepSpeed's `stage3_max_live_parameters` and `stage3_max_reuse_distance`, as `train.strategy.zero` sets them."""
STRATEGIES = {"single": _single, "ddp": _ddp, "fsdp2": _fsdp2, "zero1": _zero12, "zero2": _zero12, "zero3": _zero3}


@lru_cache(maxsize=64)
def _after(trace: Trace) -> list[int]:
    """For each section, the trained numbers of those behind it: their gradients appear first."""
    found, total = [], 0
    for section in reversed(list(trace.each())):
        found.append(total)
        total += section.numel(trainable=True)
    return found[::-1]


def _gathered(x: _Shape, held: _Held, moment: Moment, sections: list[Section]) -> float:
    """Bytes of sharded weights that are whole in a moment, beside those of `computing`."""
    if not held.gather:
        return 0.0
    block = moment.section.name == "block"
    window = (1 + held.ahead) * x.gathered(moment.section, held.gather) if block else 0.0
    if held.keeps:
        until = sum(x.gathered(s, held.gather) for s in sections[: moment.index + 1])
        return min(until, max(window, held.keeps * held.gather))
    if moment.backward and moment.section.name == "after" and sections[moment.index - 1].name == "block":
        return held.ahead * x.gathered(sections[moment.index - 1], held.gather)  # the last block comes back already
    return window


def holds(trace: Trace, layout: Layout) -> Holding:
    """What a rank holds at the moment of its step that needs most. Raises KeyError for an unknown strategy."""
    x = _Shape.of(trace, layout)
    held = STRATEGIES[layout.strategy](x)
    if layout.ema:
        held.always["moving average of weights"] = 4.0 * x.trainable * (held.share if layout.strategy != "ddp" else 1.0)
    if trace.mode == "autocast" and trace.precision != "fp32":
        held.computing["16-bit copies of weights"] = float(sum(s.repeat * s.copies for s in trace.sections))
    if layout.quantised:
        biggest = max(
            (p.numel for s in trace.sections if s.name == "block" for p in s.params if not p.trainable), default=0
        )
        held.computing["4-bit weights unpacked"] = float(x.half * biggest)
    if layout.foreach and layout.offload == "none":
        held.updating["temporary"] = held.updating.get("temporary", 0.0) + x.master * x.trainable * held.share

    activations, offloaded = moments(
        trace, layout.micro_batch, layout.checkpointing, layout.compile, layout.activation_offload
    )
    if offloaded:
        held.host["saved activations"] = offloaded
    if layout.offload != "none" and layout.strategy in ("fsdp2", "zero2", "zero3"):
        held.gradient = 0.0  # they go to the host as they are reduced
    gradients = held.gradient * x.trainable * held.share
    largest = max(s.numel(trainable=True) for s in trace.sections)
    after = _after(trace)
    sections = list(trace.each())
    done = 0  # trained numbers whose gradients have appeared
    best: tuple[float, str, dict[str, float]] = (-1.0, "", {})
    for moment in activations:
        if moment.backward:
            done = after[moment.index]
        whole = held.whole or layout.step_in_backward
        terms = dict(held.always)
        for name, value in held.computing.items():
            terms[name] = terms.get(name, 0.0) + value
        if moment.backward:
            terms |= held.reducing
        if layout.step_in_backward:
            terms["gradients"] = held.gradient * largest * held.share if moment.backward else 0.0
        else:
            terms["gradients"] = gradients if whole else held.gradient * done * held.share
        terms["gathered weights"] = terms.get("gathered weights", 0.0) + _gathered(x, held, moment, sections)
        if held.reduce and moment.backward:
            here = moment.section.numel(trainable=True)
            if layout.flat:
                here = sum(p.numel for p in moment.section.params)
            terms["gradients being reduced"] = held.reduce * here
        fresh = not whole and held.share == 1.0 and held.gradient > 0
        terms["logits and loss"] = moment.loss
        terms["saved activations"] = moment.saved - moment.loss
        terms["temporary"] = moment.temporary_fresh if fresh else moment.temporary
        if layout.device == "cuda":
            terms["allocator rounding"] = constants.ROUNDING_FRACTION * (moment.saved + terms["temporary"])
        total = sum(terms.values())
        if total > best[0]:
            best = (total, moment.name, terms)
    update = dict(held.always)
    if not layout.step_in_backward:
        update["gradients"] = gradients
    for name, value in held.updating.items():
        update[name] = update.get(name, 0.0) + value
    if sum(update.values()) > best[0]:
        best = (sum(update.values()), "update", update)
    return Holding({k: v for k, v in best[2].items() if v > 0}, held.host, best[1])
