"""slurm/devcluster: what its users are promised, on real daemons."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import slurm_cluster
from tests.slurm_cluster import TOOL, Cluster, wait_for

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.start("--nodes", "3", "--gpus", "2") as running:
        yield running


def processes_of(base: str) -> list[str]:
    """Processes of this machine that name the cluster's directory, in their arguments or environment."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            text = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
            if int(directory.name) != os.getpid() and base.encode() in text:
                found.append((directory / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_the_script_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck")
    folder = TOOL.parent
    scripts = [TOOL, *folder.glob("*.sbatch"), folder / "preflight"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nodes_are_apart_and_know_each_other(cluster):
    lines = cluster.run(
        "srun", "-N3", "bash", "-c", "echo $(hostname) $(hostname -I) $(getent hosts node2)"
    ).splitlines()
    assert sorted(lines) == [f"node{i} 10.77.0.{i} 10.77.0.2 node2" for i in (1, 2, 3)]


def test_gpus_are_handed_out(cluster):
    out = cluster.run("srun", "-N1", "--gpus-per-node=2", "env")
    assert re.search(r"^CUDA_VISIBLE_DEVICES=0,1$", out, re.M)


def test_a_job_whose_node_dies_is_requeued_and_the_node_comes_back(cluster):
    job = cluster.run("sbatch", "--parsable", "-N2", "-o", "/dev/null", "--wrap", "srun sleep 600").strip()
    facts = cluster.wait(job, "RUNNING")
    victim = cluster.run("scontrol", "show", "hostnames", facts["NodeList"]).split()[1]
    cluster.tool("node", "kill", victim)
    cluster.run("scontrol", "update", f"nodename={victim}", "state=down", "reason=test")
    wait_for(lambda: (f := cluster.job(job))["Restarts"] == "1" and f["JobState"] == "RUNNING", 40)
    assert victim not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    cluster.tool("node", "start", victim)
    cluster.idle()


def test_a_cut_node_lives_on_alone(cluster, tmp_path):
    out = tmp_path / "out"
    cluster.run("sbatch", "-w", "node3", "-o", out, "--wrap", "while :; do date +%s; sleep 0.2; done")
    wait_for(lambda: out.exists() and out.stat().st_size, 20)
    cluster.tool("node", "cut", "node3")
    wait_for(lambda: cluster.run("sinfo", "-h", "-n", "node3", "-p", "main", "-o", "%t").startswith("down"), 40)
    size = out.stat().st_size
    time.sleep(1)
    assert out.stat().st_size > size
    cluster.tool("node", "heal", "node3")
    cluster.idle()


@pytest.mark.parametrize(
    ("words", "text"),
    [("kill node9", "there is no node9"), ("start node1", "node1 is running"), ("melt node1", "unknown verb")],
)
def test_orders_that_make_no_sense(cluster, words, text):
    done = cluster.tool("node", *words.split(), check=False)
    assert (done.returncode, text in done.stderr) == (1, True)


def test_higher_partitions_preempt(cluster):
    low = cluster.run("sbatch", "--parsable", "-pgrace", "-N3", "-c4", "-o", "/dev/null", "--wrap", "sleep 600").strip()
    cluster.wait(low, "RUNNING")
    cluster.run("srun", "-N1", "-c4", "true")
    wait_for(lambda: cluster.job(low)["Restarts"] == "1", 30)
    cluster.idle()


@pytest.mark.parametrize("mode", [[], ["--plain"]], ids=["namespaces", "plain"])
@pytest.mark.parametrize("user", ["me", "nobody"])
def test_nothing_is_left_behind(mode, user, tmp_path):
    """Stop ends a running job that hides from its parents and empties its environment, and removes the directory."""
    slurm_cluster.require_slurm()
    base = f"/tmp/gs-left-{os.getpid()}"
    tool = shutil.copy(TOOL, f"{base}.tool")
    prefix = []
    if user == "nobody":
        if os.getuid() != 0:
            pytest.skip("only root can become nobody")
        prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, tool, "--dir", base, *words], capture_output=True, text=True, timeout=60, cwd="/tmp"
        )

    try:
        assert call("start", *mode).returncode == 0
        assert "already runs" in call("start", *mode).stderr
        assert call("status").returncode == 0
        hidden = f"setsid env -i {base}.sleep 600 & sleep 600"
        shutil.copy("/bin/sleep", f"{base}.sleep")
        command = [*prefix, f"{base}/bin/srun", "-N2", "bash", "-c", hidden]
        with subprocess.Popen(command, cwd="/tmp", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            wait_for(lambda: sum(f"{base}.sleep" in line for line in processes_of(base)) >= 2, 20)
            assert call("stop").returncode == 0
        wait_for(lambda: not processes_of(base), 10, lambda: processes_of(base))
        assert not Path(base).exists()
        assert not list(Path("/sys/fs/cgroup/freezer").glob("devcluster-*/*")) or cluster_elsewhere()
        assert [call("status").returncode, call("stop").returncode] == [3, 0]
        assert "no cluster" in call("node", "kill", "node1").stderr
    finally:
        call("stop")
        for suffix in (".tool", ".sleep"):
            Path(base + suffix).unlink(missing_ok=True)


def cluster_elsewhere() -> bool:
    """Other tests' clusters may run beside this one."""
    return bool(list(Path("/tmp").glob("gs-*/run/pid")))


def test_it_ends_with_its_owner(tmp_path):
    slurm_cluster.require_slurm()
    base = f"/tmp/gs-own-{os.getpid()}"
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        Cluster(base).tool("start", "--until", str(owner.pid))
        owner.kill()
        owner.wait()
        wait_for(lambda: not Path(base).exists() and not processes_of(base), 15, lambda: processes_of(base))
    finally:
        owner.kill()
        Cluster(base).tool("stop")


def test_files_of_others_survive_stop():
    slurm_cluster.require_slurm()
    base = f"/tmp/gs-keep-{os.getpid()}"
    try:
        Cluster(base).tool("start")
        Path(base, "mine").write_text("x")
        Cluster(base).tool("stop")
        assert [path.name for path in Path(base).iterdir()] == ["mine"]
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.parametrize("directory", ["/tmp/" + "x" * 60, "/tmp/a b", "/tmp/$(id)"])
def test_directories_that_slurm_cannot_hold(directory):
    done = subprocess.run([TOOL, "--dir", directory, "start"], capture_output=True, text=True)
    assert (done.returncode, "directory's name" in done.stderr) == (1, True)
    assert not Path(directory).exists()
