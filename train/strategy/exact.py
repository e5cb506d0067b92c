"""The same bits on any number of ranks (`numerics=exact`).

Owns: one forward per sample, and the fixed binary tree over the sample's index in the global batch along which gradients
and losses are summed. A rank sums the nodes that lie wholly inside its slice; the ranks exchange nodes; every rank
completes the same tree. The tree does not know how many ranks there are, so neither do the bits.

Does not own: what is one sample's loss. FSDP2 and DeepSpeed reduce in rank order inside their engines and cannot do this.

A rank holds at most log2(G) + 2 gradients: finished nodes of equal size are merged at once, like the carries of a binary
counter. (In the spirit of reproducible summation, Demmel & Nguyen 2013, with a fixed tree instead of a fixed format.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.strategy import Strategy, Values, materialise


class Tree:
    """Leaves 0..G-1 summed along the binary tree whose node (start, size) has the children (start, size/2) and
    (start + size/2, size/2); a child beyond the last leaf does not exist, and its parent is the other child."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, int, list[Tensor]]] = []

    def add(self, start: int, size: int, values: list[Tensor]) -> None:
        """Add the next node; nodes come in order of `start`. Complete pairs of siblings are merged at once."""
        self.stack.append((start, size, values))
        while len(self.stack) > 1:
            (a, n, left), (b, m, right) = self.stack[-2:]
            if n != m or a % (2 * n) != 0 or a + n != b:
                return
            torch._foreach_add_(left, right)
            self.stack[-2:] = [(a, 2 * n, left)]

    def total(self) -> list[Tensor]:
        """The root, once every leaf is in: what is left on the stack are right-hand parents with missing children."""
        _, _, total = self.stack[-1]
        for _, _, left in reversed(self.stack[:-1]):
            torch._foreach_add_(left, total)
            total = left
        return total


def nodes(low: int, high: int) -> list[tuple[int, int]]:
    """The maximal aligned nodes (start, size) inside [low, high), in order: what a rank with that slice can finish."""
    found = []
    while low < high:
        size = low & -low or 1 << (high - 1).bit_length()
        while low + size > high:
            size //= 2
        found.append((low, size))
        low += size
    return found


class Exact(Strategy):
    """Replicas whose gradients are summed along one tree. Single and DDP only, no wrapper, plain AdamW or SGD."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = 1.0  # the tree sums over ranks; nothing averages
        size, ranks = self.cfg.train.global_batch_size, self.procs.world_size
        self.slices = [(size * r // ranks, size * (r + 1) // ranks) for r in range(ranks)]
        self._reset()

    def _reset(self) -> None:
        self.tree, self.leaf = Tree(), self.slices[self.procs.rank][0]

    def wrap(self, values: Values, blocks: list[nn.Module]) -> None:
        materialise(self.module, self.procs.device, values)
        self.model = self.module

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        with self.autocast():
            yield
        if self.leaf >= self.slices[self.procs.rank][1]:  # a zero-weight grain keeps the ranks in step; it is no leaf
            self.optimizer.zero_grad(set_to_none=True)
            self._loss = None
            return
        parameters = self.trainable().values()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.optimizer.zero_grad(set_to_none=True)  # lets go of the tensors that the tree keeps
        self.tree.add(self.leaf, 1, [*gradients, self.take_loss()])
        self.leaf += 1

    def step(self, lr: float) -> Tensor | None:
        total = self._exchange()
        for p, gradient in zip(self.trainable().values(), total[:-1], strict=True):
            p.grad = gradient
        # One rank carries the mean, so that the sum of the shares adds nothing but zeros to its bits.
        self._loss = total[-1] if self.procs.is_main else torch.zeros_like(total[-1])
        self._reset()
        return super().step(lr)

    def _exchange(self) -> list[Tensor]:
        """Every rank's nodes, in order of their leaves, onto one tree: the same additions on every rank."""
        if self.procs.world_size == 1:
            return self.tree.total()
        mine = {start: values for start, _, values in self.tree.stack}
        tree, like = Tree(), [torch.empty_like(p) for p in self.trainable().values()]
        like.append(torch.empty((), device=self.procs.device))
        for rank, (low, high) in enumerate(self.slices):
            for start, size in nodes(low, high):
                values = mine[start] if rank == self.procs.rank else [torch.empty_like(t) for t in like]
                flat = torch.cat([v.reshape(-1) for v in values])
                dist.broadcast(flat, rank)
                for v, piece in zip(values, flat.split([v.numel() for v in values]), strict=True):
                    v.copy_(piece.view_as(v))
                tree.add(start, size, values)
        return tree.total()

    def grad_norm(self) -> Tensor:
        """In fp64, parameter by parameter in the model's order."""
        squares = [p.grad.double().square().sum() for p in self.trainable().values() if p.grad is not None]
        return torch.stack(squares).sum().sqrt().float()

    def name_in_force(self) -> str:
        return "single" if self.procs.world_size == 1 else "ddp"
