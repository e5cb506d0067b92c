"""A devcluster for tests, and what they ask of it. Without Slurm, tests skip; with CI set they fail instead."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
TOOL = CHECKOUT / "slurm" / "devcluster"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip")


def require_slurm() -> None:
    """Skip on a machine without Slurm; in CI that is a failure."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


class Cluster:
    """A running devcluster. `base` is short enough for Slurm's sockets."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.env = {**os.environ, "PATH": f"{base}/bin:{os.environ['PATH']}", "SLURM_CONF": f"{base}/etc/slurm.conf"}
        self.env["GEARSHIFT_DEVCLUSTER"] = base

    def tool(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TOOL, "--dir", self.base, *words], capture_output=True, text=True, check=check, timeout=60
        )

    def run(self, *command: object, check: bool = True, **more: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=120, **more)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dict."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def wait(self, job: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Wait until the job is in one of `states`, by default an end."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return wait_for(
            lambda: (facts := self.job(job)).get("JobState") in wanted and facts, timeout, lambda: self.job(job)
        )

    def idle(self) -> None:
        """Cancel all jobs and wait until every node is free and up."""
        self.run("scancel", "--user=" + self.run("id", "-un").strip())
        for line in set(self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines()):
            node, word = line.split()
            if word == "idle":
                continue
            self.tool("node", "heal", node, check=False)
            self.tool("node", "start", node, check=False)
        wait_for(lambda: set(self.run("sinfo", "-h", "-N", "-o", "%t").split()) == {"idle"}, 60)


def wait_for(condition: Callable[[], object], timeout: float, why: Callable[[], object] = lambda: "") -> object:
    """The first true value of `condition`."""
    limit = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < limit, f"not within {timeout} s: {why()}"
        time.sleep(0.1)
    return value


@contextmanager
def start(*options: str) -> Iterator[Cluster]:
    require_slurm()
    base = tempfile.mkdtemp(prefix="gs-", dir="/tmp")
    cluster = Cluster(base)
    cluster.tool("start", "--until", str(os.getpid()), *options)
    try:
        yield cluster
    finally:
        cluster.tool("stop")


def standin(directory: Path, **plan: object) -> Path:
    """A `python` for a batch script: the training it starts is `standin_train.py` with this plan, all else is real."""
    path = directory / "python"
    (directory / "standin.json").write_text(json.dumps(plan))
    path.write_text(
        "#!/bin/sh\n"
        f'case "$1 $2" in "-m train" | "-m accelerate.commands.launch")\n'
        f'    while [ "$1" != train ]; do shift; done; shift\n'
        f'    exec {sys.executable} {CHECKOUT}/tests/standin_train.py {shlex.quote(str(directory))}/standin.json "$@" ;;\n'
        f'esac\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


def standins(directory: Path) -> list[int]:
    """Process ids, on this machine, of the stand-ins that train with this directory's plan."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{directory}/standin.json".encode() in words and words[1].endswith(b"standin_train.py"):
            found.append(int(process.name))
    return found
