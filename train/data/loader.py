"""From the order of samples to batches on the device, read ahead of the step.

Owns: this rank's part of every global batch as micro-batches of one shape, the padding that gives ranks equally many of
them, the batches of an evaluation, and the threads that read while the device works.

Does not own: the order (`train/order.py`), the samples (`Dataset` in `train/data`). Holds no state that a checkpoint
would have to keep: any step can be asked for.

A batch is a dict of tensors with a leading dimension of `micro_batch_size`. Beside what the dataset gives, it has

    weight   float32[B]   1, or 0 for a row of padding: the copy of a sample, its labels all ignored
    sample   int64[B]     `order.key` of the row; 0 for padding
    epoch    int64[B]     times the source had been gone through before
    index    int64[B]     which sample of its source

Threads, not processes: reading is NumPy, file and image decoding, which release the GIL; nothing is copied between
processes, and nothing is left behind when a run is killed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from train.data import Dataset
from train.order import Order, Samples, key, micro_steps, rank_slice

Batch = dict[str, torch.Tensor]

_TASKS_PER_WORKER = 4  # samples take unequal times (a large image among small ones)
_TASK_S = 2e-3  # less work than this is not worth handing to another thread


class Loader:
    """Batches of one rank. Every rank makes the same calls and gets equally many batches from each."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        order: Order,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        seed: int,
        device: torch.device | str,
        workers: int,
    ) -> None:
        """`datasets` are the sources of `order`, in its order; `workers` is the number of threads that read."""
        self.datasets, self.order, self.seed = datasets, order, seed
        self.rank, self.world_size, self.micro_batch_size = rank, world_size, micro_batch_size
        self.device = torch.device(device)
        self.wait_s = 0.0
        """Seconds that the last `micro_batches` waited for data: 0 when reading keeps up."""
        self._tasks = _TASKS_PER_WORKER * max(workers, 1)
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="read")
        self._ahead: tuple[int, Future[_Pending]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for 0-based `step`, in (pinned) host memory, so that they can be counted without
        waiting for a device; `to_device` moves one."""
        begun = time.perf_counter()
        planned = self._ahead[1] if self._ahead and self._ahead[0] == step else self._pool.submit(self._plan, step)
        self._ahead = None
        batches = planned.result().wait()
        self.wait_s = time.perf_counter() - begun
        return batches

    def read_ahead(self, step: int) -> None:
        """Begin to read 0-based `step`, in threads. Best called just before a backward pass, which needs no interpreter:
        threads that need it too would hold up a forward pass."""
        self._ahead = (step, self._pool.submit(self._plan, step))

    def eval_batches(self, dataset: Dataset, n: int | None = None) -> Iterator[Batch]:
        """The first `n` samples of `dataset` (all of them by default), each on exactly one rank.

        Every rank yields the same number of batches, whatever `n` is; the missing rows are padding.
        """
        n = len(dataset) if n is None else min(n, len(dataset))
        size = self.micro_batch_size
        mine = range(n)[rank_slice(n, self.rank, self.world_size)]
        parts = [mine[i * size : (i + 1) * size] for i in range(micro_steps(n, self.world_size, size))]

        def plan(part: range) -> _Pending:
            zeros = np.zeros(len(part), np.int64)
            return self._read([dataset], Samples(zeros, np.array(part, np.int64), zeros), 1)

        ahead = None
        for part in parts:
            planned, ahead = ahead, self._pool.submit(plan, part)
            if planned is not None:
                yield from map(self.to_device, planned.result().wait())
        if ahead is not None:
            yield from map(self.to_device, ahead.result().wait())

    def close(self) -> None:
        """Let the threads go; what was read ahead is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, step: int) -> _Pending:
        """Runs in a thread: starts the reading of a step, in other threads."""
        size = self.order.global_batch_size
        samples = self.order.ids(step)[rank_slice(size, self.rank, self.world_size)]
        return self._read(self.datasets, samples, micro_steps(size, self.world_size, self.micro_batch_size))

    def _read(self, datasets: Sequence[Dataset], samples: Samples, count: int) -> _Pending:
        """Start to read `samples` into `count` micro-batches. Waits for nothing but the first sample."""
        rows, n = count * self.micro_batch_size, len(samples)
        if n == 0:  # more ranks than samples in an evaluation: this one computes on padding alone
            samples = Samples(*(np.zeros(1, np.int64) for _ in range(3)))
        real = np.arange(rows) < n
        taken = np.where(real, np.arange(rows), 0)  # padding copies the first sample, so that it costs no reading
        columns: dict[str, np.ndarray] = {
            "weight": real.astype(np.float32),
            "sample": np.where(real, key(samples.source, samples.index, samples.epoch)[taken], 0),
            "epoch": samples.epoch[taken],
            "index": samples.index[taken],
        }
        tensors = {name: self._empty(column.shape, column.dtype) for name, column in columns.items()}
        for name, column in columns.items():
            tensors[name].numpy()[:] = column

        begun = time.perf_counter()
        first = self._get(datasets, samples, 0)
        cost_s = time.perf_counter() - begun
        for name, value in first.items():
            tensors[name] = self._empty((rows, *np.shape(value)), np.asarray(value).dtype)
        arrays = {name: tensors[name].numpy() for name in first}
        places: list[Any] = list(range(len(samples)))
        places[0] = np.flatnonzero(taken == 0)

        def put(place: Any, sample: dict[str, np.ndarray]) -> None:
            for name, array in arrays.items():
                if np.shape(sample[name]) != array.shape[1:]:
                    raise ValueError(f"{name} has shape {np.shape(sample[name])}, in other samples {array.shape[1:]}")
                array[place] = sample[name]

        def read(numbers: range) -> None:
            for number in numbers:
                put(places[number], self._get(datasets, samples, number))

        put(places[0], first)
        for name, ignored in datasets[int(samples.source[0])].ignore.items():
            arrays[name][~real] = ignored
        share = max(-(-len(samples) // self._tasks), int(_TASK_S / max(cost_s, 1e-9)))
        tasks = [range(at, min(at + share, len(samples))) for at in range(1, len(samples), share)]
        if len(tasks) == 1:
            read(tasks.pop())
        batches = [
            {
                name: tensor[i * self.micro_batch_size : (i + 1) * self.micro_batch_size]
                for name, tensor in tensors.items()
            }
            for i in range(count)
        ]
        return _Pending(batches, [self._pool.submit(read, numbers) for numbers in tasks])

    def _get(self, datasets: Sequence[Dataset], samples: Samples, number: int) -> dict[str, np.ndarray]:
        source, index, epoch = (int(column[number]) for column in (samples.source, samples.index, samples.epoch))
        try:
            return datasets[source].get(index, epoch, self.seed)
        except Exception as error:
            error.add_note(f"while reading sample {index} of source {source}")
            raise

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=self.device.type == "cuda")

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the device; the copy overlaps with what the device does."""
        if self.device.type == "cpu":
            return batch
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}


class _Pending:
    """Micro-batches that threads are filling."""

    def __init__(self, batches: list[Batch], reading: list[Future[None]]) -> None:
        self._batches, self._reading = batches, reading

    def wait(self) -> list[Batch]:
        """The batches, once they are full. Raises what the reading raised."""
        for task in self._reading:
            task.result()
        return self._batches
