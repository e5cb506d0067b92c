"""The order of samples: permutations, quotas, ranks, cost, digests."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.order import Order, digest, key, micro_steps, permute, rank_slice

SEEDS = st.integers(-(2**63), 2**64)


def steps(order: Order, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, index and epoch of the first n steps, end to end."""
    found = [order.ids(step) for step in range(n)]
    return tuple(np.concatenate([getattr(s, name) for s in found]) for name in ("source", "index", "epoch"))  # type: ignore[return-value]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed)), np.arange(size))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2**32, 2**62), seed=st.integers(0, 2**64 - 1), start=st.integers(0, 2**62))
def test_permute_of_large_sizes_is_inside_and_one_to_one(size: int, seed: int, start: int) -> None:
    index = (np.arange(500, dtype=np.int64) + start % (size - 500)).astype(np.int64)
    out = permute(index, size, seed)
    assert out.min() >= 0
    assert out.max() < size
    assert len(set(out.tolist())) == 500


def test_permute_of_three_samples_takes_each_arrangement_equally_often() -> None:
    seen = Counter(tuple(permute(np.arange(3), 3, k).tolist()) for k in range(3000))
    assert len(seen) == 6
    assert sum((n - 500) ** 2 / 500 for n in seen.values()) < 20.5  # chi-square with 5 degrees, p = 0.001


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 300), batch=st.integers(1, 64), seed=SEEDS)
def test_each_epoch_of_one_source_is_a_permutation(size: int, batch: int, seed: int) -> None:
    order = Order([size], [1.0], batch, seed)
    _, index, epoch = steps(order, -(-3 * size // batch))
    for e in range(3):
        assert np.array_equal(np.flatnonzero(epoch == e), np.arange(e * size, min((e + 1) * size, len(epoch))))
        assert np.array_equal(np.sort(index[epoch == e]), np.arange(size))


def test_epochs_seeds_and_sources_differ() -> None:
    order = Order([500, 500], [1.0, 1.0], 1000, 0)
    source, index, epoch = steps(order, 2)
    arrangements = [index[(source == s) & (epoch == e)].tolist() for s in (0, 1) for e in (0, 1)]
    one = Order([500], [1.0], 500, 0)
    arrangements += [one.ids(0).index.tolist(), one.ids(1).index.tolist()]
    arrangements += [Order([500], [1.0], 500, seed).ids(0).index.tolist() for seed in (1, 2, -1)]
    for a in arrangements:
        assert sorted(a) == list(range(500))
    for i, a in enumerate(arrangements):
        for b in arrangements[:i]:
            assert sum(x == y for x, y in zip(a, b)) < 10  # two random arrangements agree in one place on average


def test_the_order_is_not_nearly_sorted() -> None:
    size = 100_000
    for seed in range(5):
        index = Order([size], [1.0], size, seed).ids(0).index
        assert abs(np.corrcoef(np.arange(size), index)[0, 1]) < 0.015
        assert (np.abs(np.diff(index)) == 1).sum() < 15  # neighbours that stay neighbours: 2 on average
        cells = np.histogram2d(np.arange(size), index, bins=10)[0].ravel()
        assert ((cells - 1000) ** 2 / 1000).sum() < 160  # chi-square with 81 degrees: mean 81, p = 1e-6
    in_order = np.histogram2d(np.arange(size), np.arange(size), bins=10)[0].ravel()
    assert ((in_order - 1000) ** 2 / 1000).sum() > 160  # the check can fail


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    data=st.data(),
    batch=st.integers(1, 200),
    seed=SEEDS,
    step=st.integers(0, 10**9),
)
def test_every_number_of_ranks_uses_the_same_samples(
    sizes: list[int], data: st.DataObject, batch: int, seed: int, step: int
) -> None:
    shares = data.draw(st.lists(st.floats(0.05, 10), min_size=len(sizes), max_size=len(sizes)))
    samples = Order(sizes, shares, batch, seed).ids(step)
    keys = key(samples.source, samples.index, samples.epoch)
    for world in range(1, 18):
        slices = [rank_slice(batch, rank, world) for rank in range(world)]
        parts = [samples[s] for s in slices]
        assert np.array_equal(np.concatenate([p.index for p in parts]), samples.index)
        assert sum(digest(keys[s]) for s in slices) % 2**63 == digest(keys)
        lengths = [len(p) for p in parts]
        assert max(lengths) - min(lengths) <= 1
        for micro in (1, 3, 8):
            assert micro_steps(batch, world, micro) == max(-(-n // micro) for n in lengths)


@settings(deadline=None, max_examples=40)
@given(
    sources=st.lists(st.tuples(st.integers(1, 700), st.floats(0, 100)), min_size=2, max_size=5),
    seed=SEEDS,
    block=st.integers(0, 10**8),
)
def test_quotas_are_exact_in_every_block(sources: list[tuple[int, float]], seed: int, block: int) -> None:
    sizes, shares = [s for s, _ in sources], [0.0 if w < 0.5 else w for _, w in sources]
    if not any(shares):
        shares[0] = 1.0
    order = Order(sizes, shares, 16, seed)
    samples = order.at(range(block * order.block, (block + 1) * order.block))
    counts = np.bincount(samples.source, minlength=len(sizes))
    assert tuple(counts) == order.quotas
    assert order.counts(block) == np.bincount(order.ids(block).source, minlength=len(sizes)).tolist()
    for count, share in zip(counts, shares):
        assert abs(count - order.block * share / sum(shares)) <= min(1, 0.011 * order.block * share / sum(shares))
    assert (np.diff(samples.source) != 0).sum() > 0 or max(counts) == order.block  # mixed, not one after the other


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 400), min_size=2, max_size=3), seed=SEEDS)
def test_each_source_goes_through_its_own_epochs(sizes: list[int], seed: int) -> None:
    order = Order(sizes, [3, 1, 2][: len(sizes)], 50, seed)
    samples = order.at(range(4 * order.block))
    for number, size in enumerate(sizes):
        epoch, index = samples.epoch[samples.source == number], samples.index[samples.source == number]
        assert epoch.size == 4 * order.quotas[number]
        for e in range(epoch.size // size):
            assert np.array_equal(np.sort(index[epoch == e]), np.arange(size))
        assert np.unique(index[epoch == epoch.size // size]).size == epoch.size % size


@pytest.mark.parametrize("sizes", [[10**12], [10**12, 10**9, 7]])
def test_a_late_step_costs_what_the_first_costs(sizes: list[int]) -> None:
    order = Order(sizes, [1.0] * len(sizes), 512, 3)

    def work(step: int) -> int:
        """Memory touched, which counts the work: every pass over the values allocates."""
        order.ids(step)
        tracemalloc.start()
        samples = order.ids(step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(samples) == 512
        return peak

    assert work(10**9) < 2 * work(0)
    assert work(10**9) < 512 * 8 * 100  # nothing that grows with 10^12, or with 10^9
    late = order.ids(10**9)
    assert np.all(late.index < np.array(sizes)[late.source])
    assert np.all(late.index >= 0)


def test_exact_at_ten_to_the_twelve() -> None:
    order = Order([10**12], [1.0], 10**4, 0)
    last, following = order.ids(10**8 - 1), order.ids(10**8)
    assert set(last.epoch.tolist()) == {0}
    assert set(following.epoch.tolist()) == {1}
    assert len(set(last.index.tolist())) == 10**4


def test_keys_name_uses_and_digests_show_what_is_wrong() -> None:
    source, index, epoch = np.meshgrid(np.arange(3), np.arange(200), np.arange(3), indexing="ij")
    keys = key(source, index, epoch).ravel()
    assert np.unique(keys).size == keys.size
    assert keys.min() > 0
    shuffled = np.random.default_rng(0).permutation(keys)
    assert digest(shuffled) == digest(keys)
    assert digest(np.append(keys, 0)) == digest(keys)  # padding
    assert digest(keys[1:]) != digest(keys)  # lost
    assert digest(np.append(keys, keys[0])) != digest(keys)  # repeated
    exchanged = keys.copy()
    exchanged[0] = key(0, 10**6, 0)
    assert digest(exchanged) != digest(keys)
    with np.errstate(over="ignore"):
        assert digest(keys) == int(keys.sum()) % 2**63  # what a device computes


def test_the_order_does_not_change_between_releases() -> None:
    """Runs go on across releases of the code, so these numbers may never move."""
    samples = Order([1000], [1.0], 4, 0).ids(7)
    assert samples.index.tolist() == FROZEN_ONE
    mixed = Order([1000, 50], [0.7, 0.3], 6, 11).ids(123)
    assert list(zip(mixed.source.tolist(), mixed.index.tolist(), mixed.epoch.tolist())) == FROZEN_MIXED
    assert int(key(1, 2, 3)) == FROZEN_KEY


FROZEN_ONE = [150, 970, 705, 404]
FROZEN_MIXED = [(0, 870, 0), (1, 43, 1), (0, 324, 0), (1, 6, 0), (0, 373, 0), (0, 794, 0)]
FROZEN_KEY = 3954083464952792392


@pytest.mark.parametrize(
    ("sizes", "shares", "batch"),
    [([], [], 1), ([1, 2], [1.0], 1), ([5], [1.0], 0), ([0], [1.0], 1), ([5], [0.0], 1), ([5], [-1.0], 1)]
    + [([5], [float("nan")], 1), ([5, 5], [1.0, 1e-13], 1)],
)
def test_senseless_orders_are_refused(sizes: list[int], shares: list[float], batch: int) -> None:
    with pytest.raises(ValueError):
        Order(sizes, shares, batch, 0)


def test_an_unused_source_may_be_empty() -> None:
    assert set(Order([0, 5], [0.0, 1.0], 8, 0).ids(0).source.tolist()) == {1}
