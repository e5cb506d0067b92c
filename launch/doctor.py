"""Is this machine, or this allocation, fit for a run? Every cross comes with what to do about it.

Owns: the checks of one machine (versions, compiler, devices, directory, ports, signals), the checks that need several
ranks (who sits where, bandwidth, clocks, whether all see one directory), and their table.

Does not own: whether a given run fits (`gearshift plan`). A check reads and measures; it repairs nothing.

`gearshift doctor` looks at this machine; `slurm/preflight` does so on every node of an allocation, and at the wires
between them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

FLOORS = {
    "torch": ">=2.10",
    "accelerate": ">=1.15",
    "deepspeed": ">=0.19.6",
    "hydra-core": ">=1.3.4,<1.4",
    "transformers": ">=5,<6",
    "peft": ">=0.21",
    "wandb": ">=0.28",
    "safetensors": ">=0.8",
    "numpy": ">=2",
}
PAIRS = {
    ("hydra-optuna-sweeper", ">=0", "optuna", ">=3"): "hydra-optuna-sweeper needs an older one: pip install 'optuna<3'",
    ("torch", ">=2.12", "deepspeed", "<0.19.6"): "its C++ does not compile: pip install 'deepspeed>=0.19.6'",
    ("transformers", ">=5", "peft", "<0.21"): "LoRA layers are not found: pip install 'peft>=0.21'",
    ("torchao", ">=0.8", "torchtune", "<0.7"): "torchtune does not import beside it: uninstall one of the two",
}
"""(package, version, other package, version that breaks beside it) -> what to do."""
FREE_GIB, FREE_FILES = 10, 10_000
SKEW_S = 1.0
STALE_S = 900.0


@dataclass(frozen=True)
class Check:
    """One line of the table. `good` None is a fact that is neither good nor bad here."""

    name: str
    good: bool | None
    found: str
    fix: str = ""
    host: str = ""


# ----------------------------------------------------------------------------------------------------- this machine


def machine(directory: Path, *, build: bool = False) -> list[Check]:
    """Every check that one process can make. `directory`: where runs will lie. `build`: compile what DeepSpeed needs."""
    checks: list[Check] = []
    for part in (
        _versions,
        lambda: _compiler(build),
        _devices,
        lambda: _directory(directory),
        _network,
        _signals,
        _slurm,
    ):
        try:
            checks += part()
        except Exception as error:  # a check that fails is a finding, not the end of the others
            name = getattr(part, "__name__", "check").strip("_<>")
            checks.append(
                Check(name, False, f"{type(error).__name__}: {error}", "this check itself failed; please report it")
            )
    return checks


def _versions() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    python = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Check("python", good, python, "" if good else "make an environment with Python 3.11, 3.12 or 3.13")

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    for package, floor in FLOORS.items():
        have = version(package)
        good = have is not None and SpecifierSet(floor, prereleases=True).contains(have)
        yield Check(package, good, have or "missing", "" if good else f"pip install '{package}{floor}'")
    for (one, of_one, other, of_other), fix in PAIRS.items():
        a, b = version(one), version(other)
        if a and b and SpecifierSet(of_one).contains(a) and SpecifierSet(of_other).contains(b):
            yield Check(f"{one} with {other}", False, f"{a} and {b}", fix)


def _compiler(build: bool) -> Iterator[Check]:
    """What DeepSpeed compiles its operations with, when a strategy first needs one (ZeRO on a CPU, offload, NVMe)."""
    needed = "needed for zero1-3 on a CPU and for offload"
    compiler = _first_line("g++", "--version")
    major = int((re.findall(r" (\d+)\.\d+\.\d+", compiler) or ["0"])[-1])
    yield Check("c++ compiler", major >= 9, compiler or "missing",
                "" if major >= 9 else f"apt-get install g++ (9 or newer); {needed}")  # fmt: skip
    ninja = _first_line("ninja", "--version") or _first_line(str(Path(sys.executable).with_name("ninja")), "--version")
    yield Check("ninja", bool(ninja), ninja or "missing", "" if ninja else f"pip install ninja; {needed}")
    aio = any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))
    yield Check(
        "libaio",
        aio or None,
        "found" if aio else "missing: strategy.offload=nvme needs it (apt-get install libaio-dev)",
    )
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    stale = [lock for lock in cache.rglob("lock") if time.time() - lock.stat().st_mtime > STALE_S]
    yield Check("build locks", not stale, "none stale" if not stale else f"left by a killed build: {stale[0]}",
                "" if not stale else f"runs wait for it for ever: rm {' '.join(map(str, stale))}")  # fmt: skip
    if build:
        command = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(); print('built')"
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
        last = (done.stdout.strip() or done.stderr.strip() or "nothing said").splitlines()[-1]
        yield Check("deepspeed cpu_adam", done.returncode == 0, last,
                    "" if done.returncode == 0 else "see the compiler's message: python -m deepspeed.env_report")  # fmt: skip


def _devices() -> Iterator[Check]:
    import torch

    from launch import local

    flags = next((line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags")), "")
    native = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    yield Check(
        "cpu", None, f"{local.cores()} cores; bf16 {'native (' + native[0] + ')' if native else 'not native: fp32'}"
    )
    present = local.gpus()
    if not present:
        yield Check("gpu", None, "none")
        return
    if not torch.cuda.is_available():
        built = torch.version.cuda
        fix = f"the driver is older than CUDA {built}: update it, or install a torch for its CUDA" if built else (
            "this torch is a CPU build: pip install torch with CUDA (see https://pytorch.org)")  # fmt: skip
        yield Check("gpu", False, f"{present} present, but torch {torch.__version__} cannot use them", fix)
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if card.major >= 8 else "no bf16: train.precision=fp32"
        busy = total - free > 0.1 * total
        text = f"{card.name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free, sm_{card.major}{card.minor}, {bf16}"
        yield Check(f"gpu {index}", not busy, text, "another process uses it: nvidia-smi shows which" if busy else "")
    if torch.cuda.device_count() > 1:
        topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True).stdout
        links = sorted(set(re.findall(r"\b(NV\d+|PIX|PXB|PHB|NODE|SYS)\b", topology)))
        yield Check("links", None, " ".join(links) or "unknown")


def _directory(directory: Path) -> Iterator[Check]:
    """What checkpoints and the lock rely on: atomic rename, hard links, space."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".doctor-") as scratch:
        a, b, c = (Path(scratch, name) for name in "abc")
        a.write_text("new")
        b.write_text("old")
        started = time.perf_counter()
        with a.open("r+") as file:
            os.fsync(file.fileno())
        os.replace(a, b)
        took = time.perf_counter() - started
        yield Check("rename", b.read_text() == "new", f"replaces a file, {took * 1e3:.0f} ms with fsync",
                    "" if b.read_text() == "new" else f"set run.root to another file system than {directory}'s")  # fmt: skip
        try:
            os.link(b, c)
            yield Check("hard links", True, "the lock can be taken")
        except OSError as error:
            yield Check("hard links", False, str(error), "the lock needs them: set run.root to another file system")
    space = os.statvfs(directory)
    gib = space.f_bavail * space.f_frsize / 2**30
    yield Check("space", gib >= FREE_GIB, f"{gib:.0f} GiB free in {directory}",
                "" if gib >= FREE_GIB else f"free {FREE_GIB} GiB, or set run.root elsewhere")  # fmt: skip
    files = space.f_favail if space.f_files else FREE_FILES
    yield Check("inodes", files >= FREE_FILES, f"{files} free" if space.f_files else "not limited",
                "" if files >= FREE_FILES else "remove small files, or set run.root elsewhere")  # fmt: skip


def _network() -> Iterator[Check]:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as server:
            server.bind((address, 0))
            server.listen(1)
            with socket.create_connection(server.getsockname(), timeout=5):
                pass
        yield Check("host name", True, f"{host} is {address}, and a port there can be reached")
    except OSError as error:
        yield Check(
            "host name", False, f"{host}: {error}", f"ranks cannot meet here: put '127.0.1.1 {host}' into /etc/hosts"
        )


_LISTENER = """
import signal, sys, time
def answer(number, frame):
    print(signal.Signals(number).name, flush=True)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, answer)
print("ready", flush=True)
time.sleep(20)
time.sleep(20)
"""


def _signals() -> Iterator[Check]:
    """Send a process, started as ranks are, the signals with which a scheduler gives notice."""
    command = [sys.executable, "-c", _LISTENER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        heard = [child.stdout.readline().strip()]
        for number in (signal.SIGUSR1, signal.SIGTERM):
            child.send_signal(number)
            if _readable(child.stdout.fileno(), 5.0):
                heard.append(child.stdout.readline().strip())
        child.kill()
    good = heard == ["ready", "SIGUSR1", "SIGTERM"]
    yield Check("signals", good, " ".join(heard[1:]) + " arrive" if good else f"only {heard}",
                "" if good else "something above this shell blocks them; start from a fresh login")  # fmt: skip


def _slurm() -> Iterator[Check]:
    if not shutil.which("sbatch"):
        return
    if "SLURM_CONF" not in os.environ and not Path("/etc/slurm/slurm.conf").exists():
        yield Check("slurm", None, "installed, and not set up here; to try it: slurm/devcluster start")
        return
    ping = _first_line("scontrol", "ping")
    good = " UP" in ping
    yield Check(
        "slurm",
        good,
        ping or "no answer",
        "" if good else "the controller is down, or SLURM_CONF names another cluster",
    )
    settings = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=30).stdout
    facts = dict(re.findall(r"^(\w+)\s*= (.*)$", settings, re.M))
    requeue = facts.get("JobRequeue") == "1"
    yield Check(
        "requeue", requeue or None, "jobs are requeued" if requeue else "off by default; our scripts ask for it"
    )
    wait = facts.get("KillWait", "30 sec")
    yield Check("kill wait", None, f"{wait} between TERM and KILL: a save after scancel has so long")
    if "SLURM_JOB_ID" in os.environ:
        nodes, gpus = os.environ.get("SLURM_JOB_NUM_NODES", "1"), os.environ.get("SLURM_GPUS_ON_NODE", "0")
        hint = "; slurm/preflight looks at all of them" if nodes != "1" else ""
        yield Check("allocation", None, f"job {os.environ['SLURM_JOB_ID']}, {nodes} node(s), {gpus} GPU(s) each{hint}")


def _first_line(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _readable(descriptor: int, timeout_s: float) -> bool:
    import select

    return bool(select.select([descriptor], [], [], timeout_s)[0])


# ---------------------------------------------------------------------------------------------------- several ranks


def ranks(directory: Path) -> list[Check]:
    """What only ranks together can tell; every rank calls, the first gets the checks, the others none.

    The launcher (torchrun, `slurm/preflight`) has set the ranks' environment. The first rank of each node adds the
    checks of its machine.
    """
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    host = socket.gethostname()

    own = [] if local_rank else [asdict(check) | {"host": host} for check in machine(directory)]
    dist.barrier()
    seat = {
        "host": host,
        "device": str(torch.cuda.get_device_properties(device).uuid) if gpu else f"cpu {local_rank}",
        "name": torch.cuda.get_device_name(device) if gpu else "cpu",
        "clock": time.time(),
        "checks": own,
    }
    mark = directory / f".doctor-{os.environ.get('TORCHELASTIC_RUN_ID', 'x')}-{os.environ['MASTER_PORT']}"
    if rank == 0:
        mark.write_text("seen")
    dist.barrier()
    seat["sees"] = _sees(mark)
    speed = _all_reduce(dist, torch, device)
    seats: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(seats, seat)
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return []
    mark.unlink(missing_ok=True)
    return [Check(**check) for seat in seats for check in seat["checks"]] + list(_together(seats, speed, directory))


def _sees(mark: Path) -> bool:
    """Whether a file that another node wrote appears within 5 s (NFS may keep a listing for some)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if mark.read_text() == "seen":
                return True
        time.sleep(0.1)
    return False


def _all_reduce(dist: Any, torch: Any, device: Any) -> float:
    """Bus bandwidth of an all-reduce of 64 MiB, GB/s: 2 (n - 1) / n x bytes / time, the best of five."""
    data = torch.ones(16 * 2**20, device=device)
    n, best = dist.get_world_size(), float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(data)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        data.fill_(1.0)
    return float(2 * (n - 1) / n * data.numel() * 4 / best / 1e9)


def _together(seats: Sequence[dict[str, Any]], speed: float, directory: Path) -> Iterator[Check]:
    """The checks of all ranks' seats."""
    for number, seat in enumerate(seats):
        yield Check(f"rank {number}", None, f"{seat['host']}, {seat['name']} ({seat['device']})")
    places = [(seat["host"], seat["device"]) for seat in seats]
    shared = sorted({place for place in places if places.count(place) > 1})
    yield Check("one device each", not shared, "yes" if not shared else f"shared: {shared}",
                "" if not shared else "start one rank per device: hardware.devices_per_node")  # fmt: skip
    blind = sorted({seat["host"] for seat in seats if not seat["sees"]})
    yield Check("one directory", not blind, f"all see {directory}" if not blind else f"not seen on {', '.join(blind)}",
                "" if not blind else "set run.root to a directory that all nodes share")  # fmt: skip
    clocks = [seat["clock"] for seat in seats]
    skew = max(clocks) - min(clocks)
    yield Check("clocks", skew < SKEW_S, f"{skew:.2f} s apart",
                "" if skew < SKEW_S else "synchronise them (chrony): logs and caches compare times")  # fmt: skip
    hosts = len({seat["host"] for seat in seats})
    yield Check("all-reduce", None, f"{speed:.2f} GB/s over {len(seats)} ranks on {hosts} node(s)")


# ------------------------------------------------------------------------------------------------------- the command


def run(directory: Path, *, as_json: bool = False, build: bool = False, say: Callable[[str], None] = print) -> int:
    """`gearshift doctor`: this machine, and two or more ranks on it. 0 without a cross, else 1."""
    from launch import local

    checks = machine(directory, build=build)
    processes = local.gpus() or min(2, local.cores())
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "launch.doctor", str(directory), "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        known = {check.name for check in checks}
        try:
            found = [Check(**check) for check in json.loads(done.stdout.splitlines()[-1])]
            checks += [check for check in found if check.name not in known]
        except (ValueError, IndexError):
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            checks.append(
                Check("ranks", False, last, "several ranks do not start here; run it again with --json for all")
            )
    return tell(checks, as_json=as_json, say=say)


def tell(checks: Sequence[Check], *, as_json: bool, say: Callable[[str], None] = print) -> int:
    """Print the table, what several hosts share once; 1 if anything is wrong."""
    bad = [check for check in checks if check.good is False]
    if as_json:
        say(json.dumps([asdict(check) for check in checks]))
        return 1 if bad else 0
    rows: dict[tuple[str, bool | None, str, str], list[str]] = {}
    for check in checks:
        rows.setdefault((check.name, check.good, check.found, check.fix), []).append(check.host)
    for (name, good, found, fix), hosts in rows.items():
        where = f"  [{', '.join(hosts)}]" if any(hosts) and len(rows) > 1 else ""
        say(f"{ {True: '✓', False: '✗', None: ' '}[good] } {name:<20} {found}{where}")
        if good is False:
            say(f"  {'':<20} -> {fix}")
    say(f"\n{len(bad)} of {len(checks)} checks need attention." if bad else "\nAll is well.")
    return 1 if bad else 0


def main(argv: Sequence[str]) -> int:
    """`python -m launch.doctor DIR [--json]`, as a rank."""
    checks = ranks(Path(argv[0]))
    return tell(checks, as_json="--json" in argv) if checks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
