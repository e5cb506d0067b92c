"""Every number that the planner takes from elsewhere: data sheets, library defaults, and what was fitted. Data only.

Owns: the table of cards, the byte sizes of packed formats, and the few fitted constants of memory and time, each with
its source. `benchmarks/plan_vs_published.py --fit` fits the latter again and prints them; it also reports how the planner
does on a source that a fit has not seen.

Does not own: any formula.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A device, from its maker's data sheet. Dense, without sparsity, accumulating in fp32."""

    half_tflops: float  # bf16 (fp16 where there is no bf16) matrix products
    full_tflops: float  # fp32 matrix products as torch runs them by default, without TF32
    bandwidth_gb_s: float
    memory_gib: float  # usable, as `torch.cuda.get_device_properties` reports it
    watts: float
    generation: str
    link_gb_s: float = 25.0  # to the next device of the node, one direction: NVLink, else PCIe

    @property
    def host_gb_s(self) -> float:
        """Memory bandwidth of the host such a card sits in: half of what the channels of a server (2 x 8 of DDR4-3200, a
        DGX A100's) or of a desktop (2 of DDR5-5600) add up to."""
        return 200.0 if self.link_gb_s >= 150 else 45.0


CARDS: dict[str, Card] = {
    "v100-16gb": Card(125, 15.7, 900, 15.8, 300, "volta", 150),
    "v100-32gb": Card(125, 15.7, 900, 31.7, 300, "volta", 150),
    "t4": Card(65, 8.1, 320, 14.6, 70, "turing", 12),
    "rtx2080ti": Card(53.8, 13.4, 616, 10.8, 250, "turing", 12),
    "a10": Card(125, 31.2, 600, 22.0, 150, "ampere"),
    "a10g": Card(70, 31.5, 600, 22.0, 300, "ampere"),
    "a30": Card(165, 10.3, 933, 23.5, 165, "ampere"),
    "a100-40gb": Card(312, 19.5, 1555, 39.4, 400, "ampere", 300),
    "a100-80gb": Card(312, 19.5, 2039, 79.2, 400, "ampere", 300),
    "rtx3060": Card(25.3, 12.7, 360, 11.7, 170, "ampere"),
    "rtx3070": Card(40.6, 20.3, 448, 7.8, 220, "ampere"),
    "rtx3080": Card(59.5, 29.8, 760, 9.8, 320, "ampere"),
    "rtx3090": Card(71.2, 35.6, 936, 23.6, 350, "ampere"),
    "a6000": Card(154.8, 38.7, 768, 47.4, 300, "ampere"),
    "l4": Card(121, 30.3, 300, 22.0, 72, "ada"),
    "l40s": Card(362, 91.6, 864, 44.4, 350, "ada"),
    "rtx4060": Card(60.5, 15.1, 272, 7.6, 115, "ada"),
    "rtx4090": Card(165.2, 82.6, 1008, 23.6, 450, "ada"),
    "rtx5090": Card(209.5, 104.8, 1792, 31.4, 575, "blackwell", 50),
    "gh200": Card(989, 67, 4000, 94.5, 700, "hopper", 450),
    "h100-pcie": Card(756, 51, 2039, 79.1, 350, "hopper", 50),
    "h100": Card(989, 67, 3350, 79.1, 700, "hopper", 450),
    "h200": Card(989, 67, 4800, 139.8, 700, "hopper", 450),
    "b200": Card(2250, 80, 8000, 178.0, 1000, "blackwell", 900),
    "gb200": Card(2450, 80, 8000, 184.0, 1200, "blackwell", 900),
}
"""Name of `hardware.gpu` -> card. NVIDIA's data sheets; consumer cards at half their rate with fp16 accumulation."""

DEFAULT_INTER_GB_S = {"volta": 12.5, "turing": 12.5, "ampere": 200.0, "ada": 12.5, "hopper": 400.0, "blackwell": 400.0}
"""Bandwidth of a node to the others where nobody says: the usual cluster of each generation, one port per card."""

CPU_CORE_GFLOPS = 40.0  # fp32 matrix products of one AVX2 core, measured on server cores of 2.5 to 3 GHz
CPU_CORE_HALF = 2.0  # how much faster in bf16 where it is native (AVX512-BF16, AMX)
CPU_BANDWIDTH_GB_S = 10.0  # of one core

# ---- Sizes of formats: facts of the libraries

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; an 8-bit scale per 64; an fp32 scale of scales per 256
NF4_SINGLE_BYTES = 0.5 + 4 / 64  # without double quantisation
BLOCK_8BIT = 256  # numbers that share an fp32 scale in 8-bit AdamW

PROCESS_BYTES = 4.0 * 2**30  # of host memory: a rank's Python, libraries, pinned buffers and data threads

# ---- What a run spends beside its steps

COMPILE_S = 90.0  # torch.compile of one block, forward and backward

PRODUCTIVE_NODES = 0.90  # "higher than 90 % effective training time": the Llama 3 paper, on a cluster
PRODUCTIVE_ONE_NODE = 0.97  # evaluation and checkpoints alone

# ---- Memory beyond tensors

ROUNDING_FRACTION = 0.08  # of activations: blocks are handed out larger than asked; fitted on litgpt and torchtune rows
RESERVE_FRACTION = 0.052  # allocator: reserved over allocated, median of the published pairs (2.8 to 9.3 %)
CUDA_CONTEXT_BYTES = 0.5 * 2**30  # torch >= 2, lazy loading of kernels
NCCL_BYTES = 0.8 * 2**30  # buffers of one communicator


# ---- Published figures that stand beside a plan

PUBLISHED = {
    "pretrain_7b": ("Llama 2 7B", 184_320, "model card of Llama 2"),
    "pretrain_70b": ("Llama 2 70B", 1_720_320, "model card of Llama 2"),
}
LLAMA2_HOURS = 3_311_616  # of its four models, the same card
LLAMA2_QUOTED_USD = 20e6


@dataclass(frozen=True)
class Speed:
    """The constants of time, shared by every model and source. Fitted, unless a source is named."""

    matmul: float = 0.76  # of the data sheet's rate, for large products
    matmul_hopper: float = 0.57  # the same for cards whose clocks fall under load
    narrow: float = 150.0  # a product whose sides are this long takes (1 + 3) times as long
    attention: float = 0.55  # FlashAttention-2 paper: causal, forward and backward, A100
    attention_hopper: float = 0.36  # the same kernel on H100, from its repository
    bandwidth: float = 0.85  # of the data sheet's
    kernel_s: float = 3.0e-6  # a kernel's start and end, on the device
    launch_s: float = 6.0e-6  # a kernel's launch from Python
    overlap: float = 0.4  # of computation that communication can hide behind
    link: float = 0.5  # of a link's rate
    rank_s: float = 20e-6  # latency of a collective


SPEED = Speed()
