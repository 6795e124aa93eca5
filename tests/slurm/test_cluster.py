"""The test cluster itself: hosts of their own, a node that loses power and comes back, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, Site
from tests.slurm.jobs import job_of, submit, wait_for, wait_for_end, wait_for_restart


def script(folder: Path, *lines: str) -> Path:
    path = folder / "job.sbatch"
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return path


def test_each_node_is_a_host_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    body = 'echo "$(hostname) $(hostname -i) $(ps -e | wc -l) $(ls /dev/shm | wc -l) $CUDA_VISIBLE_DEVICES"'
    job = submit(cluster, script(tmp_path, f"srun --label bash -c '{body}; sleep 0.5'"), "-N2", "--gpus-per-node=3")
    done = wait_for_end(cluster, job)
    assert (done.state, done.exit_code, done.restarts) == ("COMPLETED", 0, 0)
    hosts = sorted(line.split() for line in done.log_text.splitlines())
    assert [host[:3] for host in hosts] == [["0:", "n1", cluster.address("n1")], ["1:", "n2", cluster.address("n2")]]
    for host in hosts:
        assert int(host[3]) < 25  # PID 1, slurmd, slurmstepd, the task
        assert host[4:] == ["0", "0,1,2"]


@pytest.mark.extended
def test_a_node_loses_power_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    lines = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then sleep 300; fi', "echo again"
    job = submit(cluster, script(tmp_path, *lines), "--nodelist=n2", "--requeue")
    wait_for(cluster, job, lambda job: job.state == "RUNNING")
    cluster.cut_power("n2")
    wait_for_restart(cluster, job, 1)
    cluster.power_on("n2")
    done = wait_for_end(cluster, job)
    assert (done.state, done.restarts, done.log_text) == ("COMPLETED", 1, "again\n")


def exists(interface: str) -> bool:
    """Returns True if this machine has a network interface of that name."""
    return Path("/sys/class/net", interface).exists()


def test_nothing_is_left_of_a_cluster(slurm_installed: None, tmp_path: Path) -> None:
    private = tmp_path / "scratch"
    site = Site(nodes=1, private=(str(private),), loopback_names=True)
    with Cluster(tmp_path / "c", site) as cluster:
        job = submit(cluster, script(tmp_path, f"touch {private}/mine", "getent hosts n1", "sleep 300 &", "sleep 300"))
        wait_for(cluster, job, lambda job: "127.0.1.1" in job.log_text)
        running = [process for name in ("controller", "n1") for process in cluster.processes(name)]
        assert len(running) > 8
        assert job_of(cluster, job).state == "RUNNING"
        interface = cluster.interface
        assert exists(interface)
    assert not [process for process in running if process.is_running()]
    assert not exists(interface)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert list(private.iterdir()) == []  # what the node wrote there was its own


STARTS_A_CLUSTER = """
import sys
from pathlib import Path
from tests.slurm.cluster import Cluster, Site

cluster = Cluster(Path(sys.argv[1]), Site(nodes=1))
cluster.start()
pids = [process.pid for name in ("controller", "n1") for process in cluster.processes(name)]
print(cluster.interface, *pids, flush=True)
input()
"""


def test_nothing_is_left_of_a_test_that_was_killed(slurm_installed: None, tmp_path: Path, repo_root: Path) -> None:
    program = [sys.executable, "-c", STARTS_A_CLUSTER, str(tmp_path / "c")]
    with subprocess.Popen(
        program, cwd=repo_root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."}
    ) as test:
        assert test.stdout is not None
        interface, *pids = test.stdout.readline().decode().split()
        running = [psutil.Process(int(pid)) for pid in pids]
        assert len(running) > 5 and exists(interface)
        test.kill()
    _, alive = psutil.wait_procs(running, timeout=20)
    assert alive == []
    deadline = time.monotonic() + 20  # the kernel takes namespaces down in the background
    while exists(interface) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not exists(interface)
