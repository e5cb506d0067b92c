"""Which layout a run should have: what fits, how long it takes, what to change where nothing fits. Imports no torch itself.

Owns: `Plan` (one layout with everything that is predicted of it), `search` over strategies and levers, `plan` (the first
of them), `changes` (what would make an experiment fit, priced), `all_hardware` (a row per tier).

Does not own: the arithmetic (`memory.py`, `timing.py`), the text (`show.py`), what a plan is used for.

Those that fit come first, by the predicted time of the whole run, compilation included; among those that take the same
time (within five in a hundred) the simplest comes first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from train.compose import read_yaml
from train.config import CONF, HardwareConfig, StrategyConfig, node_range, validate
from train.data import total_steps
from train.plan import constants, machines, memory, timing
from train.plan.memory import GIB, Layout
from train.plan.subject import Subject
from train.plan.timing import Machine

if TYPE_CHECKING:
    from train.config import Config

ORDER = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")  # from the simplest
SAME = 0.05  # times that differ by less are the same: the predictions' own error
MOVING = ("saved activations", "logits and loss", "temporary", "allocator rounding")  # grow with the micro-batch
FITS = 0.97  # of the device's memory: the predictions' own error


@dataclass(frozen=True)
class Plan:
    """One layout of one run on one machine, and what is predicted of it. Memory is of one device, at its peak."""

    fits: bool
    strategy: str
    ranks: int
    nodes: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    precision: str
    activation_checkpointing: int
    chunked_loss: bool
    compile: bool
    offload: str
    offload_parameters: bool
    memory_gib: dict[str, float]  # by name; they add up to `peak_memory_gib`
    peak_memory_gib: float
    allocated_gib: float  # of it, tensors: what the run measures
    limit_gib: float
    moment: str
    host_gib: dict[str, float]  # of one node
    host_limit_gib: float
    step_s: float
    step_parts_s: dict[str, float]  # they add up to `step_s`
    samples_per_s: float
    tokens_per_s: float | None
    mfu: float
    parameters: int
    trainable: int
    steps: int | None
    hours: float | None  # of the whole run; None where its length is not known
    device_hours: float | None
    kwh: float | None
    usd: float | None
    hardware: str
    reason: str = ""  # why it does not fit
    assumed: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """What to type for this layout."""
        text = [
            f"strategy={self.strategy}",
            f"strategy.micro_batch_size={self.micro_batch_size}",
            f"strategy.activation_checkpointing={self.activation_checkpointing}",
        ]
        if self.chunked_loss:
            text.append("strategy.chunked_loss=true")
        if self.compile:
            text.append("strategy.compile=true")
        if self.offload != "none":
            text.append(f"strategy.offload={self.offload}")
        if self.offload_parameters:
            text.append("strategy.offload_parameters=true")
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `plan.json`."""
        return {**asdict(self), "overrides": self.overrides()}


@dataclass(frozen=True)
class Change:
    """What would make an experiment fit."""

    overrides: tuple[str, ...]
    plan: Plan
    learns: bool  # it changes what is learned, not only where it runs


@dataclass(frozen=True)
class Row:
    """A tier of hardware: its plan, and what would make it fit where it does not."""

    hardware: str
    plan: Plan
    change: Change | None = None


# --------------------------------------------------------------------------------------------------------------------
# Searching
# --------------------------------------------------------------------------------------------------------------------


def plan(cfg: Config, info: Mapping[str, Any] | None = None) -> Plan:
    """The best layout of `cfg`; one with `fits` false where none fits. Raises ConfigError."""
    return search(cfg, info)[0]


def search(cfg: Config, info: Mapping[str, Any] | None = None, *, take: bool = True) -> list[Plan]:
    """Every layout that `cfg` allows, the best first; those that do not fit after those that do, the nearest first.

    info: `Prepared.info` where data is prepared; what is missing is assumed and said. `strategy=auto` leaves every lever
    to the search; a strategy by name keeps the levers as they are set and plans only the micro-batch and chunked loss.
    take: whether traces may be taken, else NoTrace is raised where one is missing.

    On a CPU, where a run may take no longer than planning it, what trades time for memory is looked at only where nothing
    simpler fits.
    """
    subject = Subject(cfg, info or {}, take)
    machine = machines.machine_of(cfg.hardware)
    precision = machines.precision_of(cfg, machine)
    found: list[Plan] = []
    judged: dict[int, tuple[Layout, bool]] = {}  # id of a plan -> what it was made from
    layouts = list(_layouts(cfg, machine, length(subject)[0]))
    if machine.device == "cpu":
        layouts.sort(key=_trade)
    for _, kind in groupby(layouts, key=_trade):
        if machine.device != "cpu" or not any(p.fits for p in found):
            for layout, chunked in kind:
                found.append(_judge(subject, machine, precision, layout, chunked))
                judged[id(found[-1])] = layout, chunked
    fitting = [p for p in found if p.fits]
    failing = sorted((p for p in found if not p.fits), key=_excess)
    if not fitting:
        return failing
    quickest = min(_whole(p) for p in fitting)
    same = [p for p in fitting if _whole(p) <= quickest * (1 + SAME)]
    rest = [p for p in fitting if _whole(p) > quickest * (1 + SAME)]
    same.sort(key=lambda p: (_complexity(p), _whole(p)))
    free = cfg.strategy.micro_batch_size is None and cfg.numerics == "fast"
    if machine.device == "cuda" and free and len(fitting) > 1:
        layout, chunked = judged[id(same[0])]
        share = -(-cfg.train.global_batch_size // machine.ranks)
        fuller = _fuller(lambda one: _judge(subject, machine, precision, one, chunked), layout, share)
        if fuller is not None and _whole(fuller) <= _whole(same[0]) * (1 + SAME):
            same.insert(0, fuller)
    return [*same, *sorted(rest, key=_whole), *failing]


def _fuller(judge: Callable[[Layout], Plan], layout: Layout, share: int) -> Plan | None:
    """The layout with the largest micro-batch that fits, of the sizes that part a rank's share of the global batch with less
    than a sample a micro-step over. None if its power of two is that already."""
    best = None
    sizes = sorted({-(-share // count) for count in range(1, layout.accumulation)} - {layout.micro_batch})
    first, last = 0, len(sizes)
    while first < last:  # memory grows with the micro-batch
        middle = (first + last) // 2
        size = sizes[middle]
        found = judge(replace(layout, micro_batch=size, accumulation=-(-share // size)))
        if found.fits:
            first, best = middle + 1, found
        else:
            last = middle
    return best


def _whole(p: Plan) -> float:
    """Seconds of the run, or of a step of the same batch where the run's length is not known."""
    return p.hours * 3600 if p.hours is not None else p.step_s


def _excess(p: Plan) -> float:
    return max(p.peak_memory_gib / p.limit_gib, sum(p.host_gib.values()) / max(p.host_limit_gib, 1e-9))


def _complexity(p: Plan) -> tuple[Any, ...]:
    return (
        p.offload != "none",
        p.offload_parameters,
        ORDER.index(p.strategy),
        p.compile,
        p.chunked_loss,
        p.activation_checkpointing > 0,
        p.gradient_accumulation_steps,
    )


def _trade(layout: tuple[Layout, bool]) -> tuple[int, bool, bool]:
    return ORDER.index(layout[0].strategy), layout[1], layout[0].checkpointing > 0


def _layouts(cfg: Config, machine: Machine, length: int | None) -> Iterator[tuple[Layout, bool]]:
    """(layout, chunked loss) of everything that `cfg` allows on `machine`. length: of the run in steps, if it is known."""
    s, ranks = cfg.strategy, machine.ranks
    auto = s.name == "auto"
    share = max(1, -(-cfg.train.global_batch_size // ranks))
    sizes = [2**i for i in range(10) if 2**i < share] + [share]
    if s.micro_batch_size is not None:
        sizes = [min(s.micro_batch_size, share)]
    if cfg.numerics == "exact":
        sizes = [1]
    lm = cfg.task.name == "causal_lm"
    chunkings = (s.chunked_loss,) if s.chunked_loss is not None else (False, True) if lm else (False,)
    cuda = machine.device == "cuda"
    fused = s.fused_optimizer if s.fused_optimizer is not None else cuda and cfg.numerics == "fast"
    worth = (
        auto and cuda and cfg.numerics == "fast" and length is not None
    )  # compiling pays over a run, not over a step
    compiles = (False, True) if worth and not s.compile else (s.compile,)
    checkpoints = (0, 1) if auto and s.activation_checkpointing == 0 else (s.activation_checkpointing,)
    for name, offload, with_parameters in _engines(cfg, machine):
        for micro in sizes:
            for checkpointing in checkpoints:
                for chunked in chunkings:
                    for compiled in compiles:
                        laid = Layout(
                            strategy=name, ranks=ranks, micro_batch=micro, accumulation=-(-share // micro),
                            checkpointing=checkpointing, offload=offload, offload_parameters=with_parameters,
                            activation_offload=s.activation_offload, compile="blocks" if compiled else "none",
                            optimizer=cfg.optim.name, momentum=cfg.optim.momentum > 0,
                            foreach=not fused and cfg.numerics == "fast" and cfg.optim.name == "adamw",
                            ema=cfg.optim.ema is not None, quantised=cfg.peft.name == "qlora",
                            bucket_bytes=s.bucket_mb * 2**20, persistence_threshold=s.persistence_threshold,
                            device=machine.device,
                        )  # fmt: skip
                        yield laid, bool(chunked)


def _engines(cfg: Config, machine: Machine) -> Iterator[tuple[str, str, bool]]:
    """(strategy, offload, parameters too) that the config's own rules allow."""
    s = cfg.strategy
    if s.name != "auto":
        yield s.name, s.offload, s.offload_parameters
        return
    cuda = machine.device == "cuda"
    names = (
        ["single"] if machine.ranks == 1 else ["ddp", "fsdp2", "zero1", "zero2", "zero3"] if cuda else ["ddp", "fsdp2"]
    )
    if cfg.numerics == "exact" or cfg.optim.name == "adamw_8bit":
        names = [n for n in names if n in ("single", "ddp")]
    elif cfg.peft.name == "qlora":
        names = [n for n in names if n in ("single", "ddp", "fsdp2")]
    for name in names:
        yield name, "none", False
    if cuda and cfg.optim.name == "adamw" and cfg.peft.name != "qlora" and cfg.numerics == "fast":
        yield "zero2", "cpu", False
        yield "zero3", "cpu", False
        yield "zero3", "cpu", True
        if cfg.hardware.nvme_path is not None:
            yield "zero3", "nvme", False


def _judge(subject: Subject, machine: Machine, precision: str, layout: Layout, chunked: bool) -> Plan:
    cfg = subject.cfg
    mode = "autocast" if layout.strategy in ("single", "ddp") else "weights"
    trace = subject.trace(precision=precision, mode=mode, chunked=chunked, device=machine.device)
    held = memory.holds(trace, layout)
    terms = held.terms | memory.device_overhead(held.allocated, layout.ranks, machine.device)
    host = {name: value * machine.devices for name, value in held.host.items()}
    if machine.device == "cuda":
        host["processes"] = constants.PROCESS_BYTES * machine.devices
    peak, limit = sum(terms.values()), machine.memory_bytes
    reason = ""
    if peak > FITS * limit:
        reason = _why(terms, layout, limit)
    elif sum(host.values()) > FITS * machine.host_bytes:
        reason = f"the host holds {sum(host.values()) / GIB:.0f} GiB of {machine.host_bytes / GIB:.0f} GiB"
    step = timing.step_time(trace, layout, machine)
    steps, assumed = length(subject)
    hours = device_hours = kwh = usd = None
    if steps is not None:
        compile_s = constants.COMPILE_S if layout.compile != "none" and machine.device == "cuda" else 0.0
        hours = (steps * step.seconds / timing.productive(machine) + compile_s) / 3600
        device_hours = hours * machine.ranks
        kwh = device_hours * (machine.watts_per_device or machine.card.watts) / 1e3
        usd = device_hours * machine.usd_per_device_h if machine.usd_per_device_h is not None else None
    peak_flops = (machine.card.full_tflops if precision == "fp32" else machine.card.half_tflops) * 1e12
    rate = cfg.train.global_batch_size / step.seconds
    return Plan(
        fits=not reason, strategy=layout.strategy, ranks=layout.ranks, nodes=machine.nodes,
        micro_batch_size=layout.micro_batch, gradient_accumulation_steps=layout.accumulation,
        global_batch_size=cfg.train.global_batch_size, precision=precision,
        activation_checkpointing=layout.checkpointing, chunked_loss=chunked, compile=layout.compile != "none",
        offload=layout.offload, offload_parameters=layout.offload_parameters,
        memory_gib={name: value / GIB for name, value in terms.items() if value > 0},
        peak_memory_gib=peak / GIB, allocated_gib=held.allocated / GIB, limit_gib=limit / GIB, moment=held.moment,
        host_gib={name: value / GIB for name, value in host.items() if value > 0},
        host_limit_gib=machine.host_bytes / GIB,
        step_s=step.seconds, step_parts_s={name: value for name, value in step.parts.items() if value > 0},
        samples_per_s=rate, tokens_per_s=rate * trace.tokens if trace.tokens > 1 else None,
        mfu=step.flops / step.seconds / peak_flops,
        parameters=trace.numel(), trainable=trace.numel(trainable=True),
        steps=steps, hours=hours, device_hours=device_hours, kwh=kwh, usd=usd,
        hardware=cfg.hardware.name, reason=reason, assumed=assumed,
    )  # fmt: skip


def _why(terms: Mapping[str, float], layout: Layout, limit: float) -> str:
    """The constraint that binds, in words."""
    moving = sum(terms.get(name, 0.0) for name in MOVING)
    state = sum(terms.values()) - moving
    whole = f"{sum(terms.values()) / GIB:.1f} GiB on a device with {limit / GIB:.1f} GiB"
    if state > FITS * limit:
        return f"{whole}: weights, gradients and optimizer state alone take {state / GIB:.1f} GiB"
    rows = "one sample" if layout.micro_batch == 1 else f"{layout.micro_batch} samples"
    return f"{whole}: the activations of {rows} take {moving / GIB:.1f} GiB beside {state / GIB:.1f} GiB of model state"


def length(subject: Subject) -> tuple[int | None, tuple[str, ...]]:
    """(steps of the run, or None where its length is in epochs of data that nobody has counted; what was assumed)."""
    cfg, t = subject.cfg, subject.cfg.train
    assumed: list[str] = []
    if "vocab_size" in subject.facts and "vocab_size" not in subject.info:
        assumed.append(f"a vocabulary of {subject.facts['vocab_size']:,}")
    if "num_classes" in subject.facts and "num_classes" not in subject.info:
        assumed.append(f"{subject.facts['num_classes']} classes")
    samples = subject.info.get("train_samples")
    if t.max_epochs is not None and not samples:
        return None, (*assumed, "the run's length is in epochs of data that is not prepared yet")
    return total_steps(cfg, samples or []), tuple(assumed)


# --------------------------------------------------------------------------------------------------------------------
# Where nothing fits
# --------------------------------------------------------------------------------------------------------------------


def changes(cfg: Config, info: Mapping[str, Any] | None = None, *, elsewhere: bool = True) -> list[Change]:
    """What would make `cfg` fit, the cheapest first: another layout, shorter rows, adapters, more nodes, and, `elsewhere`,
    another tier."""
    found: list[Change] = []
    for options, learns in _attempts(cfg, info, elsewhere):
        for overrides, changed in options:
            if changed.strategy.name == "single" and machines.machine_of(changed.hardware).ranks > 1:
                overrides, changed = (*overrides, "strategy=auto"), replace(changed, strategy=StrategyConfig())
            if not validate(changed) and (best := plan(changed, info)).fits:
                found.append(Change(overrides, best, learns))
                break
    price = [c.plan.usd if c.plan.usd is not None else c.plan.device_hours or c.plan.step_s for c in found]
    return [found[i] for i in sorted(range(len(found)), key=lambda i: price[i])]


def _attempts(
    cfg: Config, info: Mapping[str, Any] | None, elsewhere: bool
) -> Iterator[tuple[list[tuple[tuple[str, ...], Config]], bool]]:
    """Kinds of change, each a list of (overrides, changed config) from the smallest, and whether it changes the math."""

    def with_(group: str, name: str, value: Any) -> tuple[tuple[str, ...], Config]:
        changed = copy.deepcopy(cfg)
        setattr(getattr(changed, group), name, value)
        word = f"{group}={value}" if name == "name" else f"{group}.{name}={value}"
        return (word,), changed

    if cfg.strategy.name != "auto":
        yield [(("strategy=auto",), replace(cfg, strategy=StrategyConfig()))], False
    if cfg.data.kind in ("text", "chat") and any(_without_activations(p) for p in search(cfg, info)):
        rows = [cfg.data.seq_len // 2**i for i in range(1, 5) if cfg.data.seq_len // 2**i >= 128]
        yield [with_("data", "seq_len", n) for n in rows], True
    if cfg.model.path is not None:
        kinds = {"none": ("lora", "qlora"), "lora": ("qlora",)}.get(cfg.peft.name, ())
        yield [with_("peft", "name", name) for name in kinds], True
    if cfg.hardware.devices_per_node and cfg.hardware.gpu is not None:
        now, each = node_range(cfg.hardware.nodes)[0], cfg.hardware.devices_per_node
        more = [now * 2**i for i in range(1, 9) if now * 2**i * each <= cfg.train.global_batch_size]
        yield [with_("hardware", "nodes", str(n)) for n in more], False
    if elsewhere:
        others = {name: hardware for name, hardware in tiers().items() if name != cfg.hardware.name}
        yield [((f"hardware={name}",), replace(cfg, hardware=hardware)) for name, hardware in others.items()], False


def _without_activations(p: Plan) -> bool:
    """Whether it would fit if a row were short enough."""
    moving = sum(p.memory_gib.get(name, 0.0) for name in MOVING)
    return p.peak_memory_gib - moving < FITS * p.limit_gib and sum(p.host_gib.values()) < FITS * p.host_limit_gib


# --------------------------------------------------------------------------------------------------------------------
# All hardware
# --------------------------------------------------------------------------------------------------------------------


def tiers() -> dict[str, HardwareConfig]:
    """The GPU tiers of `conf/hardware`, from the least memory to the most."""
    found = {}
    for path in sorted((CONF / "hardware").glob("*.yaml")):
        data = read_yaml(path)
        if data.get("gpu"):
            found[path.stem] = HardwareConfig(**data)

    def size(hardware: HardwareConfig) -> float:
        return (hardware.memory_gib or 0) * (hardware.devices_per_node or 1) * node_range(hardware.nodes)[0]

    return dict(sorted(found.items(), key=lambda item: size(item[1])))


def all_hardware(cfg: Config, info: Mapping[str, Any] | None = None) -> list[Row]:
    """A row per tier, from the smallest to the cluster on which each device has one sample of the batch, or 1,024 devices."""
    rows = []
    places = tiers()
    name, largest = list(places.items())[-1]
    nodes = min(1024, cfg.train.global_batch_size) // (largest.devices_per_node or 1)
    if nodes > node_range(largest.nodes)[0]:
        title = f"{name} hardware.nodes={nodes}"
        places[title] = replace(largest, nodes=str(nodes), name=title)
    for title, hardware in places.items():
        changed = replace(cfg, hardware=hardware)
        ranks = (hardware.devices_per_node or 1) * node_range(hardware.nodes)[0]
        if ranks > cfg.train.global_batch_size:
            continue
        best = plan(changed, info)
        nearest = [] if best.fits else changes(changed, info, elsewhere=False)
        rows.append(Row(title, best, nearest[0] if nearest else None))
    return rows
