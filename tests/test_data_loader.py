"""Batches: every sample on one rank, equally many batches everywhere, padding that carries nothing, waiting, errors."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.loader import Batch, Loader
from train.order import Order, digest, key


class Numbers:
    """Samples that say who they are: `x` is all `base + index`, `labels` too."""

    fingerprint = "numbers"

    def __init__(self, size: int, base: int = 0) -> None:
        self.ignore = {"labels": -100}
        self.size, self.base = size, base
        self.reads: Counter[tuple[int, int]] = Counter()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        with self.lock:
            self.reads[index, epoch] += 1
        value = self.base + index
        return {"x": np.full((2, 3), value, np.float32), "labels": np.full(4, value, np.int64)}


def loaders(sets: list[Numbers], batch: int, world: int, micro: int, workers: int = 2) -> list[Loader]:
    order = Order([len(s) for s in sets], [1.0] * len(sets), batch, 5)
    return [
        Loader(sets, order, rank=rank, world_size=world, micro_batch_size=micro, seed=5, device="cpu", workers=workers)
        for rank in range(world)
    ]


def check_batch(batch: Batch, micro: int) -> None:
    """One shape, right types, and padding that is a copy of a sample with nothing to learn from."""
    kinds = {"weight": torch.float32, "sample": torch.int64, "epoch": torch.int64, "index": torch.int64}
    assert {name: batch[name].dtype for name in kinds} == kinds
    assert batch["x"].shape == (micro, 2, 3)
    assert batch["labels"].shape == (micro, 4)
    padding = batch["weight"] == 0
    assert bool(((batch["weight"] == 1) | padding).all())
    assert torch.equal(batch["sample"] == 0, padding)
    assert bool((batch["labels"][padding] == -100).all())
    assert torch.equal(batch["labels"][~padding][:, 0].float(), batch["x"][~padding][:, 0, 0])
    assert bool((batch["x"] >= 0).all())


@settings(deadline=None, max_examples=15)
@given(batch=st.integers(1, 13), world=st.integers(1, 6), micro=st.integers(1, 5), step=st.integers(0, 50))
def test_the_ranks_share_out_exactly_the_step(batch: int, world: int, micro: int, step: int) -> None:
    if world > batch:
        world = batch
    sets = [Numbers(9), Numbers(4, base=100)]
    ranks = loaders(sets, batch, world, micro)
    order = ranks[0].order
    expected = order.ids(step)
    got = [loader.micro_batches(step) for loader in ranks]
    assert len({len(batches) for batches in got}) == 1
    seen: list[tuple[int, int]] = []
    keys = []
    for batches in got:
        for one in batches:
            check_batch(one, micro)
            real = one["weight"] > 0
            seen += [(int(x), int(e)) for x, e in zip(one["x"][real][:, 0, 0], one["epoch"][real])]
            keys.append(one["sample"])
    base = np.array([0, 100])[expected.source]
    assert seen == list(zip((base + expected.index).tolist(), expected.epoch.tolist()))  # ranks end to end: the step
    whole = digest(key(expected.source, expected.index, expected.epoch))
    assert int(torch.cat(keys).sum()) % 2**63 == whole
    assert int(torch.cat(keys[:-1] + [keys[-1] + 1]).sum()) % 2**63 != whole
    for loader in ranks:
        loader.close()


def test_a_step_is_read_once_and_ahead() -> None:
    data = Numbers(40)
    (loader,) = loaders([data], batch=8, world=1, micro=3)
    for step in range(5):  # one epoch of 40
        assert len(loader.micro_batches(step)) == 3
        loader.read_ahead(step + 1)
    loader._ahead[1].result().wait()  # type: ignore[index]
    assert data.reads == Counter({(i, 0): 1 for i in range(40)} | {(int(i), 1): 1 for i in loader.order.ids(5).index})
    assert torch.equal(loader.micro_batches(3)[0]["x"], loaders([data], 8, 1, 3)[0].micro_batches(3)[0]["x"])
    loader.close()


def test_waiting_is_measured() -> None:
    class Slow(Numbers):
        def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
            time.sleep(0.02)
            return super().get(index, epoch, seed)

    (loader,) = loaders([Slow(64)], batch=8, world=1, micro=8, workers=2)
    loader.micro_batches(0)
    waited = loader.wait_s
    assert waited > 0.03
    loader.read_ahead(1)
    loader._ahead[1].result().wait()  # type: ignore[index]
    loader.micro_batches(1)
    assert loader.wait_s < waited / 2
    loader.close()


@pytest.mark.parametrize(("n", "world", "micro"), [(7, 3, 2), (7, 3, 1), (7, 3, 8), (2, 5, 1), (8, 1, 3), (1, 2, 4)])
def test_evaluation_counts_each_sample_once_in_equally_many_batches(n: int, world: int, micro: int) -> None:
    data = Numbers(n)
    ranks = loaders([Numbers(50)], batch=10, world=world, micro=micro)
    got = [list(loader.eval_batches(data)) for loader in ranks]
    assert len({len(batches) for batches in got}) == 1
    seen = []
    for batches in got:
        for batch in batches:
            check_batch(batch, micro)
            seen += batch["index"][batch["weight"] > 0].tolist()
    assert sorted(seen) == list(range(n))
    assert [b["index"][b["weight"] > 0].tolist() for b in ranks[0].eval_batches(data, 1)] == (
        [[0]] if world == 1 else [[]]
    )
    for loader in ranks:
        loader.close()


def test_evaluation_takes_the_first_n() -> None:
    ranks = loaders([Numbers(50)], batch=10, world=2, micro=2)
    seen = [
        i for loader in ranks for b in loader.eval_batches(Numbers(30), 5) for i in b["index"][b["weight"] > 0].tolist()
    ]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert len(list(ranks[0].eval_batches(Numbers(3), 10))) == 1


def test_the_number_of_threads_changes_nothing() -> None:
    results = []
    for workers in (0, 1, 7):
        (loader,) = loaders([Numbers(100), Numbers(7, base=1000)], batch=33, world=1, micro=4, workers=workers)
        results.append([batch for step in range(3) for batch in loader.micro_batches(step)])
        loader.close()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_error_says_which_sample() -> None:
    class Broken(Numbers):
        def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
            if index == 3:
                raise OSError("truncated file")
            return super().get(index, epoch, seed)

    class Ragged(Numbers):
        def get(self, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
            return {"x": np.zeros((2, 1 if index == 3 else 3), np.float32), "labels": np.zeros(4, np.int64)}

    (loader,) = loaders([Broken(6)], batch=6, world=1, micro=2)
    with pytest.raises(OSError, match="truncated") as caught:
        loader.micro_batches(0)
    assert caught.value.__notes__ == ["while reading sample 3 of source 0"]
    (loader,) = loaders([Ragged(6)], batch=6, world=1, micro=2)
    with pytest.raises(ValueError, match="x has shape"):
        loader.micro_batches(0)
