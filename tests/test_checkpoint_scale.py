"""The index of a very large checkpoint: 70 billion parameters that 512 ranks of ZeRO-3 saved, read by one rank of 384.

Only the index is large here: the files are sparse and hold nothing but their headers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from tests import ranks
from train import checkpoint

SAVED, LOADED, LAYERS = 512, 384, 80
KINDS = ("master", "exp_avg", "exp_avg_sq")
LAYER = {
    "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672), "input_layernorm": (8192,), "post_attention_layernorm": (8192,),
}  # fmt: skip
INDEX_MIB, SECONDS, MEMORY_GIB = 64, 10.0, 1.0

READ = """
import json, math, resource, sys, time
from pathlib import Path
from train.checkpoint import Reader
path, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader, found = Reader(path), 0
for name, shape in reader.shapes.items():
    size = math.prod(shape)
    first, last = size * rank // world_size, size * (rank + 1) // world_size - 1
    for kind in reader.kinds:  # the first and the last value of what this rank owns, and one where two files meet
        for at in (first, (first + last) // 2, last):
            found += len(reader.read(name, kind, at, 1))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.monotonic() - began, "gib": peak / 2**20, "found": found, "files": len(reader._files)}))
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Llama 3 70B's."""
    found = {"model.embed_tokens.weight": (128256, 8192)}
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
    return {**found, "model.norm.weight": (8192,), "lm_head.weight": (128256, 8192)}


def write(path: Path, wanted: set[int]) -> int:
    """The manifest, and of the files those of the ranks in `wanted`; the number of parameters."""
    names = shapes()
    sizes = {name: math.prod(shape) for name, shape in names.items()}
    numbers = {name: number for number, name in enumerate(names)}
    path.mkdir(parents=True)
    files = []
    for rank in range(SAVED):
        ranges = []
        for name, size in sizes.items():
            part = -(-size // SAVED)
            start, end = min(size, rank * part), min(size, (rank + 1) * part)
            ranges += [(name, kind, start, end - start) for kind in KINDS if end > start]
        header, table = checkpoint._header(ranges, numbers)
        size = len(header) + 4 * sum(numel for *_, numel in ranges)
        files.append({"name": f"rank-{rank:05d}.safetensors", "sha256": "0" * 64, "size": size, **table})
        if rank in wanted:
            with (path / files[-1]["name"]).open("wb") as file:
                file.write(header)
                os.truncate(file.fileno(), size)
    manifest = {
        "format": checkpoint.FORMAT, "step": 1, "attempt": 1, "math_hash": "0" * 64, "exec_hash": "0" * 64,
        "counters": {}, "optimizer_steps": 1, "tensors": [[name, list(shape)] for name, shape in names.items()],
        "aliases": {}, "kinds": sorted(KINDS), "files": files,
    }  # fmt: skip
    manifest["manifest_sha256"] = checkpoint._manifest_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return sum(sizes.values())


def test_one_rank_of_many_finds_its_part_of_seventy_billion(tmp_path: Path) -> None:
    path, rank = tmp_path / "step-00000001", 200
    near = rank * SAVED // LOADED
    parameters = write(path, set(range(near - 2, near + 4)))
    assert parameters == 70_553_706_496
    mib = (path / "manifest.json").stat().st_size / 2**20
    command = [sys.executable, "-c", READ, str(path), str(rank), str(LOADED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ranks.ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    took = json.loads(done.stdout)
    print(
        f"index {mib:.1f} MiB; a rank of {LOADED} finds its part in {took['seconds']:.1f} s and {took['gib']:.2f} GiB"
    )
    assert took["found"] == 3 * len(KINDS) * len(shapes())
    assert mib < INDEX_MIB
    assert took["seconds"] < SECONDS
    assert took["gib"] < MEMORY_GIB
