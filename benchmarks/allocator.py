"""What the allocator handed out, by the profiler's own events: the measure that plans and losses are held against.

Owns: the peak of the bytes alive. Does not own: what runs meanwhile. Knows nothing of the tracer in `train/plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any


def peak_bytes(call: Callable[[], object], mapped: Collection[int] = ()) -> int:
    """Most bytes alive at once during `call`, of what was allocated in it. mapped: sizes of mapped files, which are no memory."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += 0 if abs(size) in mapped else size
        peak = max(peak, live)
    return peak
