"""launch/doctor.py and slurm/preflight: every check on this machine, and each with a fault planted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from launch import doctor
from tests import slurm_cluster
from tests.slurm_cluster import CHECKOUT


def found(checks: object) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_versions_here():
    checks = found(doctor._versions())
    assert {name for name in ("python", *doctor.FLOORS) if checks[name].good} == {"python", *doctor.FLOORS}


@pytest.mark.parametrize(
    ("package", "version", "name", "fix"),
    [
        ("accelerate", "1.14.0", "accelerate", "pip install 'accelerate>=1.15'"),
        ("hydra-core", "1.4.0", "hydra-core", "pip install 'hydra-core>=1.3.4,<1.4'"),
        ("peft", None, "peft", "pip install 'peft>=0.21'"),
        ("deepspeed", "0.19.1", "torch with deepspeed", "pip install 'deepspeed>=0.19.6'"),
    ],
)
def test_versions_that_break(monkeypatch, package, version, name, fix):
    real = metadata.version

    def planted(asked: str) -> str:
        if asked == package and version is None:
            raise metadata.PackageNotFoundError(asked)
        return version if asked == package else real(asked)

    monkeypatch.setattr(metadata, "version", planted)
    check = found(doctor._versions())[name]
    assert check.good is False
    assert fix in check.fix


def test_compiler_and_stale_locks(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert found(doctor._compiler(False))["build locks"].good, "a build may be under way"
    os.utime(lock, (time.time() - 3600,) * 2)
    assert found(doctor._compiler(False))["build locks"].fix == f"runs wait for it for ever: rm {lock}"
    monkeypatch.setenv("PATH", "/nowhere")
    missing = found(doctor._compiler(False))["c++ compiler"]
    assert (missing.good, missing.found) == (False, "missing")
    assert "apt-get install g++" in missing.fix


def test_directory(monkeypatch, tmp_path):
    assert all(check.good for check in doctor._directory(tmp_path))
    assert not list(tmp_path.iterdir())

    def refused(*_: object) -> None:
        raise OSError("Operation not supported")

    Space = namedtuple("Space", "f_bavail f_frsize f_favail f_files")
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "statvfs", lambda _: Space(2**18, 4096, 12, 1000))
    checks = found(doctor._directory(tmp_path))
    assert [checks[name].good for name in ("rename", "hard links", "space", "inodes")] == [True, False, False, False]
    assert all(check.fix for check in checks.values() if check.good is False)


def test_host_name_that_leads_nowhere(monkeypatch):
    assert found(doctor._network())["host name"].good
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "no-such-host.invalid")
    assert "into /etc/hosts" in found(doctor._network())["host name"].fix


def test_signals_that_something_blocks(monkeypatch):
    assert found(doctor._signals())["signals"].good
    deaf = doctor._LISTENER.replace(
        "signal.signal(number, answer)", "signal.pthread_sigmask(signal.SIG_BLOCK, {number})"
    )
    monkeypatch.setattr(doctor, "_LISTENER", deaf)
    monkeypatch.setattr(doctor, "_readable", lambda descriptor, timeout_s, real=doctor._readable: real(descriptor, 0.3))
    assert found(doctor._signals())["signals"].good is False


def test_a_check_that_breaks_is_a_finding(monkeypatch, tmp_path):
    def broken() -> None:
        raise ValueError("planted")

    monkeypatch.setattr(doctor, "_versions", broken)
    checks = doctor.machine(tmp_path)
    assert [check.found for check in checks if check.good is False] == ["ValueError: planted"]
    assert len(checks) > 8


def seat(host: str = "a", device: str = "0", clock: float = 0.0, sees: bool = True) -> dict:
    return {"host": host, "device": device, "name": "x", "clock": clock, "sees": sees, "checks": []}


@pytest.mark.parametrize(
    ("seats", "name"),
    [
        ([seat(), seat()], "one device each"),
        ([seat(), seat(device="1", sees=False)], "one directory"),
        ([seat(), seat(host="b", clock=9.0)], "clocks"),
        ([seat(), seat(device="1")], None),
    ],
)
def test_what_ranks_tell_together(seats, name):
    bad = [check for check in doctor._together(seats, 1.0, Path("runs")) if check.good is False]
    assert [check.name for check in bad] == ([name] if name else [])
    assert all(check.fix for check in bad)


def test_hosts_with_the_same_finding_share_a_line(capsys):
    checks = [doctor.Check("torch", True, "2.13", host=host) for host in "ab"] + [doctor.Check("x", False, "y", "z")]
    assert doctor.tell(checks, as_json=False) == 1
    assert capsys.readouterr().out.splitlines()[:3] == [
        "✓ torch                2.13  [a, b]",
        "✗ x                    y",
        "                       -> z",
    ]


@pytest.mark.pulse
@pytest.mark.ranks
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "launch", "doctor", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=250)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == (1 if any(check["good"] is False for check in checks.values()) else 0)
    assert {"python", "torch", "cpu", "rename", "signals", "space"} <= checks.keys()
    if len(os.sched_getaffinity(0)) > 1:
        assert "rank 1" in checks
        assert float(checks["all-reduce"]["found"].split()[0]) > 0
    assert all(check["fix"] for check in checks.values() if check["good"] is False)


@pytest.mark.slurm
@pytest.mark.ranks
def test_preflight(tmp_path):
    with slurm_cluster.start("--nodes", "2") as cluster:
        for name, directory in (("good", tmp_path / "runs"), ("bad", "/dev/shm/runs")):
            log = tmp_path / f"{name}.log"
            words = ["--parsable", f"--output={log}", CHECKOUT / "slurm" / "preflight", directory]
            environment = {**cluster.env, "python": sys.executable, "PYTHONPATH": str(CHECKOUT)}
            command = ["sbatch", *map(str, words)]
            job = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
            facts = cluster.wait(job, timeout=120)
            text = log.read_text()
            assert "✓ notice" in text
            assert "rank 1               node2" in text, text
            assert "✓ slurm" in text
            if name == "good":
                assert (facts["ExitCode"], "✓ one directory" in text) == ("0:0", True), text
            else:  # each node has its own /dev/shm
                assert (facts["ExitCode"], "✗ one directory        not seen on node2" in text) == ("1:0", True), text
