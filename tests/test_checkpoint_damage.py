"""A thousand damaged checkpoints: every one is found and named before anything is loaded, and the one before it is taken.

The checkpoints are saved by the real saver from small ranges on two ranks. Damage is what disks, copies and hands do (bits,
cuts, holes, files missing, swapped or of another step), and what somebody does who also makes all hashes right again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from train import checkpoint, rundir
from train.checkpoint import Checkpointer, CheckpointError, Reader
from train.config import CheckpointConfig
from train.rundir import RunDir
from train.strategy import Processes

MUTATIONS = 1000
FILES = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")
RANKS = FILES[1:]


class Ranges:
    """What a checkpoint sees of a strategy: three tensors, cut differently over two ranks."""

    name = "ddp"
    replicated = True
    shapes: ClassVar = {"embed.weight": (8, 5), "norm.weight": (7,), "odd": (3, 1, 2)}
    aliases: ClassVar = {"head.weight": "embed.weight"}
    cuts: ClassVar = {"embed.weight": 23, "norm.weight": 0, "odd": 6}

    def changed_buffers(self) -> list[str]:
        return []

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def owned(self) -> Iterator[tuple[str, str, int, torch.Tensor]]:
        for number, (name, shape) in enumerate(self.shapes.items()):
            values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + 1000 * number + self.step
            first, last = ((0, self.cuts[name]), (self.cuts[name], len(values)))[self.rank]
            for kind in ("master", "exp_avg"):
                if last > first:
                    yield name, kind, first, values[first:last] * (1 if kind == "master" else 0.5)


def processes(rank: int = 0, world_size: int = 1) -> Processes:
    return Processes(rank, rank, world_size, torch.device("cpu"))


def save(run: RunDir, *steps: int) -> None:
    hashes = {"math_hash": "0" * 64, "exec_hash": "1" * 64}
    savers = []
    for rank in (1, 0):
        procs = processes(rank, 2)
        savers.append(Checkpointer(run, procs, Ranges(rank, 0), CheckpointConfig(keep=9), hashes=hashes, lock=None,
                                   attempt=1, saved_step=None))  # type: ignore[arg-type]  # fmt: skip
    for step in steps:
        for saver in savers:
            saver.strategy.step = step  # type: ignore[attr-defined]
            saver.save(step, {"samples": 8 * step, "best": 0.5, "best_step": steps[0], "wall_s": 1.25})
        for saver in savers:
            saver.wait()
            saver.report("stop")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("whole") / "run").create()
    save(run, 3, 6)
    return run


# -- damage without care for the hashes: (draw, the checkpoint, the one before it) -----------------------------------------


def flip_a_bit(draw: random.Random, path: Path, _: Path) -> None:
    file = path / draw.choice(FILES)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(draw: random.Random, path: Path, _: Path) -> None:
    file = path / draw.choice(FILES)
    os.truncate(file, draw.randrange(file.stat().st_size))


def empty(draw: random.Random, path: Path, _: Path) -> None:
    (path / draw.choice(FILES)).write_bytes(b"")


def remove(draw: random.Random, path: Path, _: Path) -> None:
    (path / draw.choice(FILES)).unlink()


def append(draw: random.Random, path: Path, _: Path) -> None:
    with (path / draw.choice(FILES)).open("ab") as file:
        file.write(draw.choice([b"\0", b"{}", b"x"]) * draw.randrange(1, 600))


def blank_a_sector(draw: random.Random, path: Path, _: Path) -> None:
    file = path / draw.choice(FILES)
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content) - 64)
    content[start : start + 64] = draw.choice([bytes(64), draw.randbytes(64)])
    file.write_bytes(content)


def copy_a_piece_elsewhere(draw: random.Random, path: Path, _: Path) -> None:
    file = path / draw.choice(FILES)
    content = bytearray(file.read_bytes())
    while True:
        a, b = draw.randrange(len(content) - 32), draw.randrange(len(content) - 32)
        if content[a : a + 32] != content[b : b + 32]:
            break
    content[a : a + 32] = content[b : b + 32]
    file.write_bytes(content)


def swap_the_ranks(_: random.Random, path: Path, __: Path) -> None:
    a, b = ((path / name).read_bytes() for name in RANKS)
    (path / RANKS[0]).write_bytes(b)
    (path / RANKS[1]).write_bytes(a)


def take_a_file_of_another_step(draw: random.Random, path: Path, other: Path) -> None:
    name = draw.choice(FILES)
    shutil.copyfile(other / name, path / name)


def take_all_of_another_step(_: random.Random, path: Path, other: Path) -> None:
    for name in FILES:
        shutil.copyfile(other / name, path / name)


def put_a_directory_there(draw: random.Random, path: Path, _: Path) -> None:
    name = draw.choice(FILES)
    (path / name).unlink()
    (path / name).mkdir()


def put_a_loop_there(draw: random.Random, path: Path, _: Path) -> None:
    name = draw.choice(FILES)
    (path / name).unlink()
    (path / name).symlink_to(name)


def edit_a_number(draw: random.Random, path: Path, _: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    places = list(numbers(manifest))
    holder, key = draw.choice(places)
    holder[key] += draw.choice([-1, 1, 7])
    (path / "manifest.json").write_text(json.dumps(manifest))


CARELESS = [
    flip_a_bit, cut, empty, remove, append, blank_a_sector, copy_a_piece_elsewhere, swap_the_ranks,
    take_a_file_of_another_step, take_all_of_another_step, put_a_directory_there, put_a_loop_there, edit_a_number,
]  # fmt: skip


# -- damage with all hashes made right again -------------------------------------------------------------------------------


def rehashed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    manifest["manifest_sha256"] = checkpoint._manifest_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def numbers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where numbers are: (their list or dict, their place in it)."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from numbers(item)
        elif isinstance(item, int | float):
            yield value, key


def change_a_range(draw: random.Random, path: Path, _: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        ranges = draw.choice([file["ranges"] for file in manifest["files"]])
        place = draw.randrange(len(ranges))
        draw.choice([
            lambda: ranges.append(list(ranges[place])),
            lambda: ranges.pop(place),
            lambda: ranges[place].__setitem__(draw.randrange(3), draw.choice([-1, 10**15, 99, None, "0", 1.5])),
            lambda: ranges.__setitem__(place, draw.choice([None, [], [0, 0], {}, 7])),
        ])()  # fmt: skip

    rehashed(path, change)


def take_a_key_away(draw: random.Random, path: Path, _: Path) -> None:
    needed = ["format", "step", "tensors", "files", "kinds", "counters", "aliases"]
    if draw.random() < 0.5:
        rehashed(path, lambda manifest: manifest.pop(draw.choice(needed)))
    else:
        key = draw.choice(["name", "sha256", "size", "ranges", "kinds"])
        rehashed(path, lambda manifest: draw.choice(manifest["files"]).pop(key))


def put_a_wrong_type(draw: random.Random, path: Path, _: Path) -> None:
    wrong = draw.choice([None, "x", -1, [1], {"a": 1}])
    if draw.random() < 0.5:
        key = draw.choice(["format", "step", "tensors", "files", "kinds"])
        rehashed(path, lambda manifest: manifest.__setitem__(key, wrong))
    else:
        key = draw.choice(["name", "sha256", "size", "ranges", "kinds"])
        rehashed(path, lambda manifest: draw.choice(manifest["files"]).__setitem__(key, wrong))


def change_a_shape(draw: random.Random, path: Path, _: Path) -> None:
    shape = draw.choice([[8, 6], [10**9, 10**9], [-8, -5], [40.0], "85", [8, 5, 0]])
    rehashed(path, lambda manifest: manifest["tensors"][0].__setitem__(1, shape))


def lead_elsewhere(draw: random.Random, path: Path, other: Path) -> None:
    names = [
        "../../../../etc/hostname",
        f"{other}/rank-00000.safetensors",
        "..",
        ".",
        "",
        "a/b",
        "rank-00000.safetensors\0",
    ]
    name = draw.choice([*names, f"../{other.name}/rank-00000.safetensors"])
    rehashed(path, lambda manifest: manifest["files"][0].__setitem__("name", name))


def change_a_header(draw: random.Random, path: Path, _: Path) -> None:
    """The safetensors header itself, with the file's and the manifest's hashes made to fit."""
    number = draw.randrange(2)
    content = (path / RANKS[number]).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entry = draw.choice(list(header))
    begin, end = header[entry]["data_offsets"]
    draw.choice([
        lambda: header.pop(entry),
        lambda: header.__setitem__(entry + "0", header.pop(entry)),
        lambda: header[entry].__setitem__("data_offsets", [begin, end + 4]),
        lambda: header[entry].__setitem__("data_offsets", [begin + len(data), end + len(data)]),
        lambda: header[entry].__setitem__("data_offsets", [begin - len(data) - 4, end - len(data) - 4]),
        lambda: header[entry].pop("data_offsets"),
        lambda: header.__setitem__(entry, [begin, end]),
        lambda: header.update({"../outside|master|0": dict(header[entry])}),
    ])()  # fmt: skip
    text = json.dumps(header).encode()
    said = draw.choice([len(text)] * 4 + [2**60, 0])
    content = said.to_bytes(8, "little") + text + data
    (path / RANKS[number]).write_bytes(content)
    new = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    rehashed(path, lambda manifest: manifest["files"][number].update(new))


CAREFUL = [change_a_range, take_a_key_away, put_a_wrong_type, change_a_shape, lead_elsewhere, change_a_header]


# --------------------------------------------------------------------------------------------------------------------------


def test_every_one_of_a_thousand_damages_is_found(whole: RunDir, tmp_path: Path) -> None:
    draw = random.Random(0)
    good, before = whole.checkpoint(6), whole.checkpoint(3)
    missed = []
    for number in range(MUTATIONS):
        damage = (CARELESS + CAREFUL)[number % len(CARELESS + CAREFUL)]
        state = draw.getstate()
        path = tmp_path / str(number) / good.name
        shutil.copytree(good, path)
        damage(draw, path, before)
        try:
            Reader(path).verify()
        except CheckpointError as error:
            if str(path) not in str(error):
                missed.append(f"{number} {damage.__name__}: the message does not name it: {error}")
        except Exception as error:
            missed.append(f"{number} {damage.__name__}: {type(error).__name__}: {error}")
        else:
            missed.append(f"{number} {damage.__name__}: not found, state {hash(state)}")
        shutil.rmtree(path.parent)
    assert not missed, "\n".join(missed)


def test_a_checkpoint_without_damage_is_whole(whole: RunDir) -> None:
    """The control of the test above."""
    reader = Reader(whole.checkpoint(6))
    reader.verify()
    for rank in range(2):
        for name, kind, start, tensor in Ranges(rank, 6).owned():
            assert (reader.read(name, kind, start, tensor.numel()) == tensor.numpy()).all()


@pytest.mark.parametrize("damage", [*CARELESS, *CAREFUL], ids=lambda damage: damage.__name__)
def test_the_one_before_is_taken_and_the_damaged_one_named(damage: Callable, whole: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    damage(random.Random(1), run.checkpoint(6), run.checkpoint(3))
    said: list[str] = []
    reader = checkpoint.newest(run, processes(), say=said.append)
    assert reader is not None
    assert reader.step == 3
    assert all(str(run.checkpoint(6)) in text for text in said)
    assert len(said) == 1


def test_when_all_are_damaged_nothing_is_loaded_in_silence(whole: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    for step in (3, 6):
        os.truncate(run.checkpoint(step) / RANKS[1], 100)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies. Restore one"):
        checkpoint.newest(run, processes(), say=lambda _: None)


def test_a_damaged_checkpoint_is_replaced_and_costs_no_good_one(whole: RunDir, tmp_path: Path) -> None:
    """With `keep=1`: the good one that was resumed from is deleted only after a newer one is committed, the damaged one with it."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    os.truncate(run.checkpoint(6) / RANKS[0], 100)
    hashes = {"math_hash": "0" * 64, "exec_hash": "1" * 64}
    for step in (4, 6):
        saver = Checkpointer(run, processes(), One(step), CheckpointConfig(keep=1), hashes=hashes, lock=None, attempt=2,
                             saved_step=3)  # type: ignore[arg-type]  # fmt: skip
        saver.save(step, {"best_step": None})
        saver.wait()
        saver.report("stop")
        assert rundir.committed(run) == [step]
        Reader(run.checkpoint(step)).verify()


class One(Ranges):
    """Everything on one rank."""

    cuts: ClassVar = {name: torch.Size(shape).numel() for name, shape in Ranges.shapes.items()}

    def __init__(self, step: int) -> None:
        super().__init__(0, step)
