"""Every fitted or published number that the planner uses, with its source. Data; imports nothing.
"""

from __future__ import annotations

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
NF4_SINGLE_BYTES = 0.5 + 4 / 64
BLOCK_8BIT = 256
RESERVE_FRACTION = 0.05
CUDA_CONTEXT_BYTES = 0.5 * 2**30
NCCL_BYTES = 1.0 * 2**30
