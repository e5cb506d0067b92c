"""A traced step as plain data: sections of a model, what each keeps and computes, for any micro-batch. Imports no torch.

Owns: `Trace` and its parts, and their form as JSON. Does not own: how a trace is taken (`trace.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Line:
    """A number that grows with the micro-batch: `base + each * micro_batch`."""

    base: float = 0.0
    each: float = 0.0

    def __call__(self, micro_batch: float) -> float:
        return self.base + self.each * micro_batch

    def __add__(self, other: Line) -> Line:
        return Line(self.base + other.base, self.each + other.each)

    def times(self, factor: float) -> Line:
        return Line(self.base * factor, self.each * factor)


@dataclass(frozen=True)
class Op:
    """Equal operators of one phase. `kind`: `matmul`, `attention`, or `memory` (all that is limited by bandwidth)."""

    kind: str
    count: int
    flops: Line  # of one; attention in full, without the causal half
    bytes: Line  # read and written by one
    shape: tuple[Line, Line, Line] = (Line(), Line(), Line())  # m, n, k of a matmul; batched ones per product
    half: bool = False  # inputs of 16 bits
    causal: bool = False
    again: int = 0  # how many of them recomputation repeats: it stops at the last tensor that the backward pass needs


@dataclass(frozen=True)
class Phase:
    """A section's forward or backward. Bytes are relative to what was alive when it began; parameters, their gradients
    and 16-bit copies of weights are not among them."""

    kept: Line = Line()  # alive at the end
    peaks: tuple[Line, ...] = ()  # the highest of them is the peak, when gradients exist already and are added to
    peaks_fresh: tuple[Line, ...] = ()  # the same, counting the gradients of parameters that this phase makes
    compiled: Line = Line()  # forward only: kept when pointwise results are recomputed, as torch.compile does
    fused: Line = Line()  # bytes moved outside matmuls and attention when pointwise operators are fused
    ops: tuple[Op, ...] = ()

    def peak(self, micro_batch: float, *, fresh: bool = False) -> float:
        return max((line(micro_batch) for line in (self.peaks_fresh if fresh else self.peaks)), default=0.0)


@dataclass(frozen=True)
class Param:
    """A parameter of a section."""

    numel: int
    rows: int  # its first dimension, along which FSDP2 shards
    trainable: bool
    matrix: bool  # the weight of a linear layer: what autocast copies and NF4 packs


@dataclass(frozen=True)
class Section:
    """A part of the model, run `repeat` times in a row."""

    name: str  # `before`, `block`, `between`, `after`
    repeat: int
    params: tuple[Param, ...]
    forward: Phase
    backward: Phase
    inputs: Line = Line()  # bytes of activations that enter: all that activation checkpointing keeps
    copies: int = 0  # bytes of 16-bit copies of fp32 weights that autocast makes

    def numel(self, *, trainable: bool) -> int:
        return self.counts[trainable]

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Numbers that are frozen, numbers that are trained."""
        trained = sum(p.numel for p in self.params if p.trainable)
        return sum(p.numel for p in self.params) - trained, trained


@dataclass(frozen=True, eq=False)  # compared and hashed as the object it is: the caches of memory and time rely on it
class Trace:
    """A step of one model on one rank, for any micro-batch and depth of sharding."""

    sections: tuple[Section, ...]  # in the order of the forward pass
    precision: str  # fp32, bf16, fp16
    mode: str  # how `precision` is reached: see `trace.MODES`
    tokens: int  # per sample: tokens of a row, or 1

    def each(self) -> Iterator[Section]:
        for section in self.sections:
            for _ in range(section.repeat):
                yield section

    @cached_property
    def trainable(self) -> int:
        return sum(s.repeat * s.numel(trainable=True) for s in self.sections)

    def numel(self, *, trainable: bool | None = None) -> int:
        if trainable is None:
            return sum(s.repeat * sum(s.counts) for s in self.sections)
        return self.trainable if trainable else self.numel() - self.trainable

    def flops(self, micro_batch: float, *, backward: bool | None = None, causal: bool = False) -> float:
        """Of one micro-batch, without recomputation. causal: count only the half of attention that is not masked."""
        total = 0.0
        for section in self.sections:
            for phase in (section.forward, section.backward):
                if backward is None or (phase is section.backward) == backward:
                    for op in phase.ops:
                        masked = 0.5 if causal and op.causal else 1.0
                        total += section.repeat * op.count * op.flops(micro_batch) * masked
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; positional and short, since traces are kept in files."""

        def line(x: Line) -> list[float]:
            return [round(x.base, 1), round(x.each, 1)]

        def phase(x: Phase) -> list[Any]:
            ops = [
                [o.kind, o.count, line(o.flops), line(o.bytes), [line(d) for d in o.shape], o.half, o.causal, o.again]
                for o in x.ops
            ]
            peaks = [[line(y) for y in lines] for lines in (x.peaks, x.peaks_fresh)]
            return [line(x.kept), *peaks, line(x.compiled), line(x.fused), ops]

        sections = [
            [
                s.name,
                s.repeat,
                [[p.numel, p.rows, p.trainable, p.matrix] for p in s.params],
                phase(s.forward),
                phase(s.backward),
                line(s.inputs),
                s.copies,
            ]
            for s in self.sections
        ]
        return {"sections": sections, "precision": self.precision, "mode": self.mode, "tokens": self.tokens}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""

        def lines(rows: list[list[float]]) -> tuple[Line, ...]:
            return tuple(Line(*row) for row in rows)

        def phase(d: list[Any]) -> Phase:
            kept, peaks, fresh, compiled, fused, ops = d
            made = tuple(
                Op(kind, count, Line(*flops), Line(*moved), (Line(*m), Line(*n), Line(*k)), half, causal, again)
                for kind, count, flops, moved, (m, n, k), half, causal, again in ops
            )
            return Phase(Line(*kept), lines(peaks), lines(fresh), Line(*compiled), Line(*fused), made)

        sections = tuple(
            Section(
                name, repeat, tuple(Param(*p) for p in params), phase(forward), phase(backward), Line(*inputs), copies
            )
            for name, repeat, params, forward, backward, inputs, copies in data["sections"]
        )
        return cls(sections, data["precision"], data["mode"], data["tokens"])
