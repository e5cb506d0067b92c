"""The output layer and its loss in chunks, beside plain `F.cross_entropy`: memory, time, gradient error.

    python benchmarks/chunked_loss.py            two minutes on two cores; writes benchmarks/results/chunked_loss_DATE.md

1,024 tokens at vocabularies of 32k to 128k, forward and backward. Memory is the peak of the allocations alive beyond the
gradient of the weight, from the profiler; time is the median of runs taken in turn; the error is the larger one of both
gradients, relative to plain cross-entropy.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.allocator import peak_bytes  # noqa: E402
from train.tasks.causal_lm import chunked_cross_entropy  # noqa: E402

TOKENS = 1024
MEMORY, TIME, ERROR = 0.2, 1.1, 1e-5


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def both(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss(hidden, weight, labels).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(vocab: int, width: int, rounds: int) -> dict[str, float]:
    """Chunked over plain: memory beyond the gradient of the weight, time; relative error of the worse gradient."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=source)
    weight = torch.randn(vocab, width, generator=source) * 0.02
    labels = torch.randint(0, vocab, (TOKENS,), generator=source)
    losses = {"plain": plain, "chunked": chunked_cross_entropy}
    gradients = {name: both(f, hidden, weight, labels) for name, f in losses.items()}
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients["chunked"], gradients["plain"], strict=True))
    del gradients
    spare = {n: peak_bytes(lambda f=f: both(f, hidden, weight, labels)) - vocab * width * 4 for n, f in losses.items()}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds):
        for name in sorted(losses, reverse=bool(number % 2)):
            times[name].append(seconds(lambda f=losses[name]: both(f, hidden, weight, labels)))
    plain_s, chunked_s = (statistics.median(times[name]) for name in ("plain", "chunked"))
    return {
        "plain_mib": spare["plain"] / 2**20,
        "chunked_mib": spare["chunked"] / 2**20,
        "plain_s": plain_s,
        "chunked_s": chunked_s,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", nargs="+", type=int, default=[32_000, 64_000, 128_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lines = [
        "# The loss in chunks\n",
        f"Measured {datetime.date.today()}, torch {torch.__version__}, CPU, {torch.get_num_threads()} thread(s): {TOKENS:,} "
        f"tokens, width {options.width}, forward and backward in fp32, beside plain `F.cross_entropy`, by "
        f"`python benchmarks/chunked_loss.py`. Memory is beyond the gradient of the weight. Bounds: memory {MEMORY} x, time "
        f"{TIME} x, gradients {ERROR:g}.\n",
        "| vocabulary | plain | in chunks | memory | plain | in chunks | time | gradients differ by | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    held = True
    for vocab in options.vocab:
        m = measure(vocab, options.width, options.rounds)
        memory, took = m["chunked_mib"] / m["plain_mib"], m["chunked_s"] / m["plain_s"]
        good = memory <= MEMORY and took <= TIME and m["error"] <= ERROR
        held &= good
        lines.append(
            f"| {vocab:,} | {m['plain_mib']:,.0f} MiB | {m['chunked_mib']:,.0f} MiB | {memory:.2f} x | {m['plain_s']:.2f} s | "
            f"{m['chunked_s']:.2f} s | {took:.2f} x | {m['error']:.1e} | {'holds' if good else '**out**'} |"
        )
        print(lines[-1], flush=True)
    target = ROOT / "benchmarks" / "results" / f"chunked_loss_{datetime.date.today()}.md"
    target.write_text("\n".join(lines) + "\n")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
