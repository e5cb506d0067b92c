"""Which samples a step uses: a pure function of (sizes, weights, global batch size, seed, step).

Owns: the order of samples, the share of a global batch that a rank takes, and the names (`key`) and digests by which a
ledger proves that every sample was used once. Nothing is stored and nothing advances: any step can be asked for at any
time, on any rank, and asking for step 10^9 of 10^12 samples costs what step 0 costs. So the state of the data in a
checkpoint is one integer, the step.

Does not own: what a sample is, or how it is read (`train/data`). Imports numpy and nothing of ours.

How. A position counts samples from the start of the run: step s owns positions [s*G, (s+1)*G). With one source,
position p is sample `permute(p % size)` of epoch `p // size`; the permutation is a Feistel network keyed by (seed,
source, epoch), walked until it lands inside the source. With several sources, positions form blocks. In every block
each source has the same quota (its weight, by largest remainder), the slots of a block are permuted by a key of its
own, and a slot says which source it is and how many samples of that source came before. From there each source goes
through its own epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of splitmix64
_MASK64 = (1 << 64) - 1
_MASK63 = (1 << 63) - 1
_ROUNDS = 6  # even, so that halves of unequal width end where they began; 4 are enough to pass for random
_AT_ONCE = 1024  # positions computed together: a few cost as much as a thousand, and steps come one after the other
_FIRST_BLOCK, _LAST_BLOCK = 1_000, 10**9
_SHARE_ERROR = Fraction(1, 100)  # largest relative error of a source's share that rounding to a block may make

# What a key is for, so that the same (seed, number) never keys two things.
_EPOCH, _BLOCK, _SAMPLE = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in the order in which the global batch holds them; three int64 arrays of the same length."""

    source: NDArray[np.int64]
    """Which source, an index into `sizes`."""
    index: NDArray[np.int64]
    """Which sample of that source."""
    epoch: NDArray[np.int64]
    """How many times the source had been gone through before; with (source, index) it names one use of a sample."""

    def __getitem__(self, where: slice) -> Samples:
        """The samples of a slice, e.g. of `rank_slice`."""
        return Samples(self.source[where], self.index[where], self.epoch[where])

    def __len__(self) -> int:
        return self.source.shape[0]


class Order:
    """The order of a run.

    `sizes` are the numbers of samples of the sources, `weights` their relative shares of the positions (any positive
    scale; 0 leaves a source out). Raises ValueError on an empty source that has weight, on weights that are not finite
    and non-negative, and on a share too small to be given a fixed quota.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], global_batch_size: int, seed: int) -> None:
        if len(sizes) != len(weights) or not sizes:
            raise ValueError(f"{len(sizes)} sources and {len(weights)} weights: one weight per source, one at least")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size}: at least 1")
        if not all(isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"weights {list(weights)}: finite, none negative, not all 0")
        for number, (size, weight) in enumerate(zip(sizes, weights)):
            if weight > 0 and size < 1:
                raise ValueError(f"source {number} has weight {weight} and no samples")
        self.sizes = tuple(sizes)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.quotas = _quotas(weights)
        self.block = sum(self.quotas)
        self._sizes = np.array([max(size, 1) for size in sizes], np.int64)
        self._quotas = np.array(self.quotas, np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._quotas)))
        self._kept: tuple[int, Samples] | None = None  # a memo: the first of some steps, and the samples of all of them

    def positions(self, step: int) -> range:
        """The positions of 0-based `step`."""
        return range(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def ids(self, step: int) -> Samples:
        """The samples of 0-based `step`, all ranks together."""
        size, group = self.global_batch_size, max(1, _AT_ONCE // self.global_batch_size)
        first, kept = step - step % group, self._kept
        if kept is None or kept[0] != first:
            self._kept = kept = first, self.at(range(first * size, (first + group) * size))
        return kept[1][(step - first) * size : (step - first + 1) * size]

    def counts(self, step: int) -> list[int]:
        """How many of the samples of 0-based `step` come from each source."""
        return np.bincount(self.ids(step).source, minlength=len(self.sizes)).tolist()

    def at(self, positions: range) -> Samples:
        """The samples at these positions."""
        position = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        if len(self.sizes) == 1:
            source, nth = np.zeros_like(position), position
        else:
            block, offset = np.divmod(position, self.block)
            slot = permute(offset, self.block, _mix(self.seed, _BLOCK, block))
            source = np.searchsorted(self._starts, slot, side="right") - 1
            nth = block * self._quotas[source] + slot - self._starts[source]
        size = self._sizes[source]
        epoch, index = np.divmod(nth, size)
        return Samples(source, permute(index, size, _mix(self.seed, _EPOCH, source, epoch)), epoch)


def rank_slice(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that a rank takes; the parts tile it and differ by one sample at most."""
    return slice(rank * global_batch_size // world_size, (rank + 1) * global_batch_size // world_size)


def micro_steps(global_batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-batches in a step, the same on every rank: what the largest slice needs. Others pad with weight 0."""
    largest = -(-global_batch_size // world_size)
    return -(-largest // micro_batch_size)


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """Where a keyed permutation of `range(size)` sends `index`. Exact for sizes up to 2^62.

    All three broadcast: elements may have a size and a key of their own. A Feistel network permutes the smallest power
    of two that holds `size`; a value that falls outside is permuted again until it is inside, which keeps it a
    permutation and takes fewer than two rounds on average.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    )
    shape = index.shape
    value, size, key = index.ravel().copy(), size.ravel(), key.ravel()
    bits = np.maximum(_bit_length(size - np.uint64(1)), np.uint64(2))
    low = bits >> np.uint64(1)
    widths = (bits - low, low)
    outside = np.arange(value.size)
    while outside.size:
        moved = _feistel(value[outside], (widths[0][outside], widths[1][outside]), key[outside])
        value[outside] = moved
        outside = outside[moved >= size[outside]]
    return value.reshape(shape).astype(np.int64)


def key(source: ArrayLike, index: ArrayLike, epoch: ArrayLike) -> NDArray[np.int64]:
    """One number in [1, 2^63) per use of a sample. It travels with the tensors into the model, 0 marking padding."""
    return np.maximum(_mix(_SAMPLE, source, index, epoch) & np.uint64(_MASK63), np.uint64(1)).astype(np.int64)


def digest(sample_keys: ArrayLike) -> int:
    """One number in [0, 2^63) for a set of uses: the sum of their keys mod 2^63.

    Order does not matter, padding adds nothing, and a sample lost, repeated or exchanged shows, as keys are hashes. On
    a device, or over ranks, it is the int64 sum of the keys (which wraps mod 2^64) taken mod 2^63.
    """
    return int(np.asarray(sample_keys, np.int64).astype(np.uint64).sum(dtype=np.uint64)) & _MASK63


def _quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in a block: the smallest block, a power of ten, that meets every share to 1 %."""
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    block = _FIRST_BLOCK
    while block <= _LAST_BLOCK:
        quotas = [int(share * block) for share in shares]
        left = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i] * block, i))
        for i in left[: block - sum(quotas)]:
            quotas[i] += 1
        if all(abs(quota - share * block) <= share * block * _SHARE_ERROR for quota, share in zip(quotas, shares)):
            return tuple(quotas)
        block *= 10
    raise ValueError(f"weights {list(weights)}: a share of {float(min(shares)):.2g} is too little to be kept")


def _feistel(
    value: NDArray[np.uint64], widths: tuple[NDArray[np.uint64], NDArray[np.uint64]], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A keyed permutation of [0, 2^(sum of widths)). Halves may differ in width: they swap places, widths and all."""
    one = np.uint64(1)
    width, other = widths
    left, right = value >> other, value & ((one << other) - one)
    for number in range(_ROUNDS):
        hashed = _scramble((key + np.uint64(number * _GOLDEN & _MASK64)) ^ (right * np.uint64(0xD6E8FEB86659FD93)))
        left, right = right, left ^ (hashed & ((one << width) - one))
        width, other = other, width
    return (left << other) | right


def _mix(*parts: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash of integers, element by element; the order of the parts matters."""
    state = np.zeros(1, np.uint64)  # not a scalar: those warn when they wrap
    for part in parts:
        # Python integers may be negative or wide (a seed is the user's); arrays are int64 and wrap by themselves.
        number = np.uint64(part & _MASK64) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        state = _scramble((state + np.uint64(_GOLDEN)) ^ number)
    return state.reshape(np.broadcast_shapes(*map(np.shape, parts)))


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection in which every bit of the input moves half of the bits of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bit_length(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`int.bit_length` of each element."""
    length = np.zeros_like(x)
    for shift in (32, 16, 8, 4, 2, 1):
        step = np.uint64(shift)
        big = x >= (np.uint64(1) << step)
        length += np.where(big, step, np.uint64(0))
        x = np.where(big, x >> step, x)
    return length + x
