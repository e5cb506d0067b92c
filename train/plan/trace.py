"""One training step of the real model and loss under fake tensors: what it keeps, what it computes. Nothing is allocated.

Owns: how a step is run and cut into sections (before, between, inside and after the repeated blocks), each with the
bytes that its forward keeps, its peaks, and its operations.

Does not own: the result's form (`shapes.py`), where the bytes lie under a strategy (`memory.py`), how long the operations
take (`timing.py`), which experiment is traced and where traces are kept (`search.py`).

How it works. The module is built on the meta device, given fake CPU parameters, and run forward and backward under a
dispatch mode that sees every operator. Memory is counted by storage from the moment an operator returns it until it is
freed, so views and aliases count once and whatever Python keeps alive counts too. Module and tensor hooks cut the step at
the repeated blocks. A deep stack of equal blocks is run with three of them, and the middle one stands for all but the
first and last. Two micro-batch sizes are run; every number is a straight line through the two (`Line`).

Attention is whatever the CPU's fused kernel saves (q, k, v, output, log-sum-exp), which is also what flash attention
saves on a GPU. Its FLOPs are counted by formula, in full, with the causal half noted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from train.plan.shapes import Line, Op, Param, Phase, Section, Trace

SIZES = (2, 3)  # micro-batches that are run: at 1 some operators skip a copy, so a line through 1 would not be straight


# --------------------------------------------------------------------------------------------------------------------
# Taking a trace
# --------------------------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("autocast", "weights")
"""How 16 bits are reached: `autocast` over fp32 weights (single, ddp), or `weights` and what enters the model in 16 bits
themselves (FSDP2, ZeRO). The same in fp32."""
Batch = dict[str, Tensor]


def trace(
    build: Callable[[], nn.Module],
    blocks: Callable[[nn.Module], list[nn.Module]],
    batch: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    precision: str,
    mode: str,
    tokens: int,
    device: str = "cuda",
    whole: bool = False,
) -> Trace:
    """Run a step of two micro-batch sizes and return what it needs.

    build: makes the module, on the meta device. blocks: its repeated blocks in order. batch: a micro-batch of that many
    samples (called under fake tensors). loss: scalar. mode: one of `MODES`. device: whose autocast rules hold, `cuda` or
    `cpu`. whole: run every block, instead of three that stand for a stack of equal ones. Raises ValueError for a model
    whose operators depend on the micro-batch, or that uses a block twice.
    """
    with torch.device("meta"):
        module = build()
    repeats = {} if whole else _shorten(module, blocks(module))
    half = None if precision == "fp32" else DTYPES[precision]
    runs = []
    with FakeTensorMode(), _as_if_real():
        _place(module, None if mode == "autocast" else half)
        if mode == "weights" and half is not None:
            module.register_forward_pre_hook(_cast_inputs(half), with_kwargs=True)
        for size in SIZES:
            runs.append(
                _run(module, blocks(module), batch(size), loss, precision if mode == "autocast" else "fp32", device)
            )
    sections = [_join(a, b, repeats) for a, b in zip(*runs, strict=True)]
    return Trace(tuple(sections), precision, mode, tokens)


def _cast_inputs(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tree_map(cast, args), tree_map(cast, kwargs)

    return hook


def _shorten(module: nn.Module, blocks: list[nn.Module]) -> dict[int, int]:
    """Cut a stack of equal blocks down to first, middle and last. Returns {index of the middle block: its repeats}."""
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList) and any(b is m[0] for b in blocks if len(m))]
    if len(stacks) != 1 or len(stacks[0]) != len(blocks) or len(blocks) <= 3:
        return {}
    stack = stacks[0]

    def kind(block: nn.Module) -> tuple[Any, ...]:
        return type(block), *((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())

    if len({kind(b) for b in stack}) != 1:
        return {}
    depth = len(stack)
    kept = [stack[0], stack[depth // 2], stack[depth - 1]]
    for index in range(depth - 1, 2, -1):
        del stack[index]
    for index, block in enumerate(kept):
        stack[index] = block
    return {1: depth - 2}


def _place(module: nn.Module, cast: torch.dtype | None) -> None:
    """Give every parameter and buffer a fake CPU tensor, keeping shared ones shared. Their values are never read."""
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for store in (owner._parameters, owner._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    dtype = (
                        cast
                        if cast is not None and old.is_floating_point() and isinstance(old, nn.Parameter)
                        else old.dtype
                    )
                    new = torch.empty(old.shape, dtype=dtype, device="cpu")
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                store[name] = made[id(old)]  # type: ignore[assignment]


@contextlib.contextmanager
def _as_if_real() -> Iterator[None]:
    """transformers builds other masks when it sees fake tensors, as for an export; the trace is of what will run."""
    masking = sys.modules.get("transformers.masking_utils")
    kept = getattr(masking, "is_tracing", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if masking is not None:
                masking.is_tracing = lambda *_: False  # type: ignore[attr-defined]
            yield
        finally:
            if masking is not None:
                masking.is_tracing = kept  # type: ignore[attr-defined]


@dataclass
class _Count:
    """One phase of one run."""

    start: float = 0.0
    kept: float = 0.0
    compiled: float = 0.0
    fused: float = 0.0
    ops: list[tuple[str, float, float, tuple[float, float, float], bool, bool]] = field(default_factory=list)
    last: int = 0  # operators before the last tensor was saved for the backward pass
    levels: list[float] = field(default_factory=list)  # bytes alive after each operator
    levels_fresh: list[float] = field(default_factory=list)

    def totals(self) -> _Count:
        """The same with one operator per kind, and the highest level alone."""
        ops = []
        for kind in ("matmul", "attention", "memory"):
            mine = [o for o in self.ops if o[0].startswith(kind)]
            largest = max(mine, key=lambda o: o[1], default=(kind, 0.0, 0.0, (0.0, 0.0, 0.0), False, False))
            ops.append((kind, sum(o[1] for o in mine), sum(o[2] for o in mine), *largest[3:]))
        return dataclasses.replace(
            self, ops=ops, last=len(ops), levels=[max(self.levels)], levels_fresh=[max(self.levels_fresh)]
        )


@dataclass(eq=False)
class _Part:
    """A section of one run."""

    name: str
    block: int = -1
    params: tuple[Param, ...] = ()
    inputs: float = 0.0
    copies: int = 0
    forward: _Count = field(default_factory=_Count)
    backward: _Count = field(default_factory=_Count)


def _run(
    module: nn.Module,
    blocks: list[nn.Module],
    batch: Batch,
    loss: Callable[[nn.Module, Batch], Tensor],
    precision: str,
    device: str,
) -> list[_Part]:
    tape = _Tape(module, blocks)
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    rules: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if precision != "fp32":
        context = torch.autocast("cpu", DTYPES[precision])
        rules = _CudaAutocast() if device == "cuda" else rules
    with tape.hooked(), context, rules, tape, torch.autograd.graph.saved_tensors_hooks(tape.saved, lambda t: t):
        value = loss(module, batch)
        tape.turn()
        value.backward()
        del value
    tape.close()
    for p in module.parameters():
        p.grad = None
    parts: list[_Part] = []
    for part in tape.parts:
        if part.forward.ops or part.params:
            parts.append(part)
        else:  # nothing happens between two blocks, but the last block's input may be let go there
            parts[-1].forward.kept += part.forward.kept  # (a compiled block keeps its inputs)
    return parts


def _join(a: _Part, b: _Part, repeats: Mapping[int, int]) -> Section:
    """The line through two runs of one section."""

    def line(x: float, y: float) -> Line:
        each = (y - x) / (SIZES[1] - SIZES[0])
        return Line(x - each * SIZES[0], each)

    def phase(x: _Count, y: _Count) -> Phase:
        ops: dict[Op, list[int]] = {}
        if [o[0] for o in x.ops] != [o[0] for o in y.ops]:  # such as a loss in more chunks: lines through the totals
            x, y = x.totals(), y.totals()
        for index, ((name, f, n, s, half, causal), (_, f2, n2, s2, _, _)) in enumerate(zip(x.ops, y.ops, strict=True)):
            shape = (line(s[0], s2[0]), line(s[1], s2[1]), line(s[2], s2[2]))
            op = Op(name.partition(":")[0], 1, line(f, f2), line(n, n2), shape, half, causal)
            counts = ops.setdefault(op, [0, 0])
            counts[0] += 1
            counts[1] += index < x.last
        joined = tuple(dataclasses.replace(op, count=count, again=again) for op, (count, again) in ops.items())
        peaks = _hull([line(*pair) for pair in zip(x.levels, y.levels, strict=True)])
        fresh = _hull([line(*pair) for pair in zip(x.levels_fresh, y.levels_fresh, strict=True)])
        return Phase(line(x.kept, y.kept), peaks, fresh, line(x.compiled, y.compiled), line(x.fused, y.fused), joined)

    forward, backward = phase(a.forward, b.forward), phase(a.backward, b.backward)
    return Section(a.name, repeats.get(a.block, 1), a.params, forward, backward, line(a.inputs, b.inputs), a.copies)


def _hull(lines: list[Line]) -> tuple[Line, ...]:
    """Those lines that are the highest at some micro-batch from 1 on: a peak moves from a constant to what grows."""
    kept: list[Line] = []
    at = 1.0
    best = max(lines, key=lambda x: (x(at), x.each), default=None)
    while best is not None:
        kept.append(best)
        # Where each steeper line overtakes the best one; the first to do so is the next.
        later = [((best.base - x.base) / (x.each - best.each), x) for x in lines if x.each > best.each]
        later = [(max(t, at), x) for t, x in later]
        at, best = min(later, key=lambda pair: (pair[0], -pair[1].each), default=(at, None))
    return tuple(kept)


# --------------------------------------------------------------------------------------------------------------------
# The tape
# --------------------------------------------------------------------------------------------------------------------

_MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward")
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)
# Not fused into its neighbours by a compiler and not recomputed: with the matmuls, where recomputation starts from.
_GATHERS = (
    "aten::embedding",
    "aten::embedding_dense_backward",
    "aten::index",
    "aten::index_put",
    "aten::sort",
    "aten::topk",
    "aten::max_pool2d_with_indices",
    "aten::max_pool2d_with_indices_backward",
)
_NOTHING = ("prim::device", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach")


@dataclass(eq=False)
class _Storage:
    """Memory that an operator returned."""

    bytes: float
    part: _Part
    anchors: frozenset[_Storage] = frozenset()  # what a compiler can compute it from again; empty: it is one itself
    pointwise: bool = False
    feeds: bool = False  # a matmul or attention reads it
    reference: Any = None


class _Tape(TorchDispatchMode):
    """Sees every operator: storages alive, FLOPs, bytes; cut into sections by hooks on the blocks."""

    def __init__(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.module, self.blocks = module, blocks
        self.live = self.fresh = 0.0  # bytes alive; the same, and the gradients of parameters made in this phase
        self.alive: dict[int, _Storage] = {}
        # Parameters and buffers, by storage. The storages are held, so that their ids stay theirs.
        self.fixed = {id(s): s for s in (t.untyped_storage() for t in (*module.parameters(), *module.buffers()))}
        self.copied: list[Any] = []  # 16-bit copies of weights; held, as autocast's cache holds them
        self.written: set[_Storage] = set()  # pointwise results that a fused kernel has already written in this phase
        self.parts = [_Part("before")]
        self.used: dict[int, _Part] = {}  # id of a parameter's storage -> where it is first used
        self.now, self.count, self.backward = self.parts[0], self.parts[0].forward, False
        self.output: _Storage | None = None  # of the block that is ending

    # -- sections

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[Any] = []
        for index, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._entering(index), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leaving))
        for p in self.module.parameters():
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(self._accumulated))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before = self.now
            entering = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
            self._next(_Part("block", index))
            if entering:
                self.now.inputs = float(entering[0].untyped_storage().nbytes())
                if entering[0].requires_grad and before.forward.ops:
                    entering[0].register_hook(lambda grad: self._back(before, grad))

        return hook

    def _leaving(self, block: nn.Module, args: Any, output: Any) -> None:
        part = self.now
        first = output if isinstance(output, Tensor) else next(t for t in output if isinstance(t, Tensor))
        if first.requires_grad:
            first.register_hook(lambda grad: self._back(part, grad))
        self.output = self._boundary(first)
        self._next(_Part("between"))

    def _next(self, part: _Part) -> None:
        self._end()
        self.parts.append(part)
        self._begin(part, part.forward)

    def _back(self, part: _Part, grad: Tensor) -> None:
        self._boundary(grad)
        self._end()
        self._begin(part, part.backward)

    def _boundary(self, t: Tensor) -> _Storage | None:
        """What crosses between sections is in memory: blocks are compiled one by one."""
        storage = self.alive.get(id(t.untyped_storage()))
        if storage is not None:
            self._write(storage)
            storage.pointwise, storage.anchors = False, frozenset()
        return storage

    def turn(self) -> None:
        """The forward is over."""
        self._end()
        last = self.parts[-1]
        last.name = "after" if len(self.parts) > 1 else last.name
        self.backward = True
        self._begin(last, last.backward)

    def close(self) -> None:
        """The backward is over: give every section its parameters, those outside blocks to where they are first used."""
        self._end()
        linear = {
            id(m.weight)
            for m in self.module.modules()
            if isinstance(getattr(m, "weight", None), nn.Parameter)
            and (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
            and not hasattr(m, "stays_whole")
        }
        owner = {id(p): index for index, block in enumerate(self.blocks) for p in block.parameters()}
        parts = {part.block: part for part in self.parts if part.block >= 0}
        for p in self.module.parameters():
            part = parts[owner[id(p)]] if id(p) in owner else self.used.get(id(p.untyped_storage()), self.parts[-1])
            part.params += (Param(p.numel(), p.shape[0] if p.ndim else 1, p.requires_grad, id(p) in linear),)

    def _begin(self, part: _Part, count: _Count) -> None:
        if count.ops:
            raise ValueError(f"a {part.name} of the model runs twice in a step: it cannot be planned from a trace")
        self.now, self.count = part, count
        count.start = self.fresh = self.live
        self.written = set()

    def _end(self) -> None:
        count = self.count
        count.kept = self.live - count.start
        if not self.backward:
            count.compiled = self._recomputing()
            self.output = None

    # -- memory

    def _accumulated(self, p: Tensor) -> None:
        """The gradient of a parameter is complete: from here on it counts as a gradient, not as an activation."""
        assert p.grad is not None
        storage = self.alive.pop(id(p.grad.untyped_storage()), None)
        if storage is not None:
            self.live -= storage.bytes

    def _see(self, t: Tensor, anchors: frozenset[_Storage], pointwise: bool) -> None:
        storage = t.untyped_storage()
        key = id(storage)
        if key in self.alive or key in self.fixed:
            return
        made = _Storage(float(storage.nbytes()), self.now, anchors, pointwise)

        def freed(_: Any) -> None:
            if self.alive.get(key) is made:
                del self.alive[key]
                self.live -= made.bytes
                self.fresh -= made.bytes

        made.reference = weakref.ref(storage, freed)
        self.alive[key] = made
        self.live += made.bytes
        self.fresh += made.bytes

    def _recomputing(self) -> float:
        """Bytes that this forward keeps when it is compiled: what matmuls read and return stays, what lies between is
        computed again."""
        mine = [s for s in self.alive.values() if s.part is self.now]
        kept = {s for s in mine if not s.pointwise or s.feeds or s is self.output}
        for s in sorted(mine, key=lambda s: -s.bytes):
            if s not in kept:
                needed = {a for a in s.anchors if a.part is self.now} - kept
                kept |= needed if sum(a.bytes for a in needed) <= s.bytes else {s}
        return sum(s.bytes for s in kept)

    # -- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if (
            name == "aten::_local_scalar_dense"
        ):  # a test of values: models ask whether nothing is masked, and nothing is
            return {torch.bool: True}.get(args[0].dtype, 1)
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        if name == _ATTENTION[0]:  # fake kernels get its layout wrong: it returns [B, T, H, D], transposed
            batch, heads, rows, width = out[0].shape
            out = (out[0].new_empty(batch, rows, heads, width).transpose(1, 2), *out[1:])
        if name in _NOTHING:
            for t in _tensors(out):
                self._see(t, frozenset(), True)
            return out
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        for t in inputs:
            key = id(t.untyped_storage())
            if key in self.fixed:
                self.used.setdefault(key, self.now)
        if name == "aten::_to_copy" and self._is_copy_of_weight(inputs[0], out):
            return out
        known = [s for s in (self.alive.get(id(t.untyped_storage())) for t in inputs) if s is not None]
        heavy = name in _MATMULS or name in _ATTENTION or name in _GATHERS
        anchors = frozenset[_Storage]()
        if heavy:
            for s in known:
                s.feeds = True
                self._write(s)
        else:
            anchors = frozenset().union(*(s.anchors if s.pointwise else {s} for s in known))
        for t in outputs:
            self._see(t, anchors, not heavy)
        self.count.levels.append(self.live - self.count.start)
        self.count.levels_fresh.append(self.fresh - self.count.start)
        self._account(name, args, kwargs or {}, inputs, outputs)
        return out

    def saved(self, t: Tensor) -> Tensor:
        """autograd keeps `t` for the backward pass; recomputation stops at the last of them. (A detached alias: with the
        tensor itself, an operator that saves its output would keep itself alive.)"""
        self.count.last = len(self.count.ops)
        return t.detach()

    def _is_copy_of_weight(self, source: Tensor, copy: Tensor) -> bool:
        if id(source.untyped_storage()) not in self.fixed or copy.element_size() >= source.element_size():
            return False
        storage = copy.untyped_storage()
        self.fixed[id(storage)] = storage
        self.now.copies += storage.nbytes()
        return True

    def _write(self, s: _Storage) -> None:
        """A fused kernel writes this pointwise result, reading what it is computed from."""
        if s.pointwise and s not in self.written:
            self.written.add(s)
            self.count.fused += s.bytes + sum(a.bytes for a in s.anchors)

    def _account(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        moved = sum(_bytes(t) for t in {id(t): t for t in (*inputs, *outputs)}.values())
        kind, flops, shape, half, causal = "memory", 0.0, (0.0, 0.0, 0.0), False, False
        if name in _MATMULS:
            kind, (flops, shape) = "matmul", _matmul(name, args, outputs)
            half = inputs[-1].element_size() == 2
        elif name in _ATTENTION:
            back = name.endswith("_backward")
            q, k = (args[1], args[2]) if back else (args[0], args[1])
            kind, flops = "attention", (8.0 if back else 4.0) * q.numel() * k.shape[-2]
            shape = (float(q.shape[-2]), float(k.shape[-2]), float(q.shape[-1]))
            half = q.element_size() == 2
            place = 7 if back else 4
            causal = bool(args[place] if len(args) > place else kwargs.get("is_causal", False))
        elif name in ("aten::embedding", "aten::index"):
            moved -= _bytes(inputs[0]) - _bytes(outputs[0])  # reads the rows that it returns, not the table
        if kind == "memory" and name in _GATHERS:
            self.count.fused += moved
        self.count.ops.append((f"{kind}:{name}", flops, moved, shape, half, causal))


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in _tensors(item)]
    if isinstance(tree, dict):
        return [t for item in tree.values() for t in _tensors(item)]
    return []


def _bytes(t: Tensor) -> float:
    """What reading `t` moves: an expanded tensor is no larger than its storage."""
    return float(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()))


def _matmul(name: str, args: Any, outputs: list[Tensor]) -> tuple[float, tuple[float, float, float]]:
    """(FLOPs, (m, n, k)) of a matrix product; a convolution is the product it is computed as."""
    if "convolution" in name:
        back = name.endswith("_backward")
        x, w = (args[1], args[2]) if back else (args[0], args[1])
        y = args[0] if back else outputs[0]
        transposed = args[7] if back else args[6]
        wide = x if transposed else y
        n, k = float(w.shape[0]), w.numel() / w.shape[0]
        m = wide.numel() / n
        times = sum(bool(mask) for mask in args[10][:2]) if back else 1
        return times * 2.0 * m * n * k, (m, n, k)
    a, b = args[-2:] if name in ("aten::mm", "aten::bmm") else args[1:3]
    m, k, n = float(a.shape[-2]), float(a.shape[-1]), float(b.shape[-1])
    return 2.0 * m * n * k * (a.shape[0] if a.ndim == 3 else 1), (m, n, k)


class _CudaAutocast(TorchFunctionMode):
    """CUDA's autocast runs norms, softmax and losses in fp32; the CPU's does not. The trace follows the device."""

    WIDENED = frozenset(
        getattr(owner, name)
        for owner, names in (
            (
                F,
                (
                    "layer_norm",
                    "group_norm",
                    "softmax",
                    "log_softmax",
                    "cross_entropy",
                    "nll_loss",
                    "mse_loss",
                    "l1_loss",
                    "binary_cross_entropy_with_logits",
                    "normalize",
                    "cosine_similarity",
                ),
            ),
            (
                torch,
                (
                    "layer_norm",
                    "group_norm",
                    "softmax",
                    "log_softmax",
                    "pow",
                    "rsqrt",
                    "exp",
                    "log",
                    "norm",
                    "sum",
                    "prod",
                    "cumsum",
                    "reciprocal",
                ),
            ),
            (
                Tensor,
                ("softmax", "log_softmax", "pow", "rsqrt", "exp", "log", "norm", "sum", "prod", "cumsum", "reciprocal"),
            ),
        )
        for name in names
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.WIDENED:
            args = tuple(_widen(a) for a in args)
            kwargs = {k: _widen(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value
