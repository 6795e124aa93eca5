"""The meaning of SLURM's variables, by tables of cases. Real SLURM: tests/slurm."""

from __future__ import annotations

import pytest

from megatron_vppo.system.slurm import SlurmTask, expand_hosts, idle_hosts, read_task


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("n[1-3,7],m02", ["n1", "n2", "n3", "n7", "m02"]),
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("a,b", ["a", "b"]),
        ("rack[1-2]n[01-02].site", ["rack1n01.site", "rack1n02.site", "rack2n01.site", "rack2n02.site"]),
        ("gpu-[3],x[1,2]y,z", ["gpu-3", "x1y", "x2y", "z"]),
    ],
)
def test_hosts_of_the_short_form(text: str, hosts: list[str]) -> None:
    assert list(expand_hosts(text)) == hosts


@pytest.mark.parametrize("text", ["n[1-3", "n[3-1]", "n[a-b]", "n[1-]", "n1]", "n[]", "n[1[2]]"])
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST="):
        expand_hosts(text)


STEP = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
}  # fmt: skip


def test_a_task_of_a_step() -> None:
    hosts = ("n1", "n2")
    assert read_task(STEP) == SlurmTask(rank=5, size=8, local_rank=1, host_number=1, hosts=hosts, name="12.0.3")
    requeued = read_task({**STEP, "SLURM_RESTART_COUNT": "2"})
    assert requeued is not None and requeued.name == "12.2.3"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "12"},
        {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_neither_a_batch_shell_nor_a_single_task_is_one_of_several(environment: dict[str, str]) -> None:
    assert read_task(environment) is None


@pytest.mark.parametrize(
    ("environment", "idle"),
    [
        ({}, 0),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"}, 0),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4", "SLURM_NNODES": "4"}, 3),
        ({"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}, 1),
        (STEP, 0),
    ],
)
def test_hosts_without_a_srun_are_idle(environment: dict[str, str], idle: int) -> None:
    assert idle_hosts(environment) == idle
