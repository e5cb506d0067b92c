"""From `hardware` to what the planner reckons with; looks at this machine where the config says `auto`. Imports no torch.

Owns: `machine_of`, `precision_of`, and the names by which cards are known.

Does not own: the data sheets (`constants.py`), what is made of them (`timing.py`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from train.compose import ConfigError
from train.config import node_range
from train.plan import constants
from train.plan.constants import CARDS, Card
from train.plan.timing import Machine

if TYPE_CHECKING:
    from train.config import Config, HardwareConfig

GIB = 2**30


def machine_of(hardware: HardwareConfig) -> Machine:
    """The machine of `hardware`; of a range of nodes the fewest, since every start plans again for what it got.

    Raises ConfigError for a card that is not in the table.
    """
    nodes = node_range(hardware.nodes)[0]
    cards = _cards_here() if hardware.gpu is None and hardware.device in ("auto", "cuda") else []
    if hardware.gpu is None and not cards:
        if hardware.device == "cuda":
            raise ConfigError(
                ["hardware.device=cuda: there is no card here to look at; name one with hardware.gpu=..."]
            )
        return _cpu(hardware, nodes)
    name = hardware.gpu or cards[0]
    card = find_card(name)
    if card is None:
        raise ConfigError(
            [
                f"hardware.gpu={name}: not a card that the planner knows. Known: {', '.join(sorted(CARDS))}. Take the nearest "
                "one, and set hardware.memory_gib."
            ]
        )
    memory = card.memory_gib if hardware.memory_gib is None else min(card.memory_gib, hardware.memory_gib)
    between = hardware.inter_node_gb_s or constants.DEFAULT_INTER_GB_S[card.generation]
    return Machine(
        card=card, device="cuda", devices=hardware.devices_per_node or len(cards) or 1, nodes=nodes,
        memory_bytes=memory * GIB, intra=(hardware.intra_node_gb_s or card.link_gb_s) * 1e9, inter=between * 1e9,
        host_bytes=(hardware.host_ram_gib or _ram() / GIB) * GIB, nvme=(hardware.nvme_gb_s or 3.0) * 1e9,
        usd_per_device_h=hardware.usd_per_device_h, watts_per_device=hardware.watts_per_device or card.watts,
    )  # fmt: skip


def precision_of(cfg: Config, machine: Machine) -> str:
    """The precision that the run will have: `auto` is bf16 where it is native."""
    if cfg.train.precision != "auto":
        return cfg.train.precision
    if machine.device == "cuda":
        return "fp32" if machine.card.generation in ("volta", "turing") else "bf16"
    return "bf16" if re.search(r"avx512_bf16|amx_bf16", _cpuinfo()) else "fp32"


def find_card(name: str) -> Card | None:
    """`a100-80gb`, `A100-SXM4-80GB` and `NVIDIA A100-SXM4-80GB` are one card."""
    plain = re.sub(r"nvidia|geforce|tesla|quadro|sxm\d*|hbm\d*e?|pcie(?=-\d)|generation|[\s_]", "", name.lower())
    plain = re.sub(r"-+", "-", re.sub(r"(?<=[a-z]\d{3})(?=\d+gb)", "-", plain)).strip("-")
    for text in (plain, re.sub(r"-?\d+gb$", "", plain), plain.replace("-", "")):
        if text in CARDS:
            return CARDS[text]
    return None


def _cpu(hardware: HardwareConfig, nodes: int) -> Machine:
    """Processes on a CPU share its cores and its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = hardware.devices_per_node or 1
    each = max(1.0, cores / processes)
    ram = (hardware.host_ram_gib * GIB) if hardware.host_ram_gib else _ram()
    limit = hardware.memory_gib * GIB if hardware.memory_gib else ram / processes
    full = constants.CPU_CORE_GFLOPS * each / 1e3
    card = Card(
        full * constants.CPU_CORE_HALF, full, constants.CPU_BANDWIDTH_GB_S * each, limit / GIB, 15.0 * each, "cpu"
    )
    watts = hardware.watts_per_device or card.watts
    return Machine(
        card, "cpu", processes, nodes, limit, 2e9, 1e9, ram, 10e9, 10e9, 1e9, hardware.usd_per_device_h, watts
    )


@lru_cache(maxsize=1)
def _cards_here() -> list[str]:
    """Names of the GPUs of this machine, as the driver's own tool says; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    named = []
    for line in lines:
        name, _, mib = line.rpartition(",")
        whole = f"{name.strip()}-{round(float(mib) / 1024)}GB"
        named.append(whole if find_card(whole) else name.strip())
    return named


def _ram() -> float:
    """Of this machine, or what the control group leaves of it."""
    try:
        installed = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError):
        installed = 8.0 * GIB
    with suppress(OSError, ValueError):
        return min(installed, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return installed


@lru_cache(maxsize=1)
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
