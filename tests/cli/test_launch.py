"""The numbers by which a process learns which rank it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vppo.cli.launch import check_rank, is_first_on_host, launch_ranks, take_rank_from_slurm

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_JOB_ID",
    "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_NODEID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip


TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
HOSTS = {**TASK, "SLURM_STEP_NODELIST": "a.invalid,b.invalid", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}


def put_in_place(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "has RANK='abc', which is no rank or size; torchrun or srun sets it"),
        ({"RANK": "", "WORLD_SIZE": ""}, "has RANK='', which"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "has RANK='-1', which"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "has WORLD_SIZE='two', which"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "has LOCAL_RANK='x', which"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "has RANK=2 and WORLD_SIZE=2; ranks count from 0"),
        ({"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "2"}, "has RANK=7 and WORLD_SIZE=2; ranks count from 0"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "two"}, "has SLURM_STEP_NUM_TASKS='two', which"),
        ({**TASK, "SLURM_NODEID": "x"}, "has SLURM_NODEID='x', which"),
        ({**TASK, "RANK": "3"}, "has RANK='3' and SLURM_PROCID=0; unset RANK"),
        ({**TASK, "WORLD_SIZE": "16"}, "has WORLD_SIZE='16' and SLURM_STEP_NUM_TASKS=2; unset WORLD_SIZE"),
        ({**TASK, "LOCAL_RANK": ""}, "has LOCAL_RANK='' and SLURM_LOCALID=0; unset LOCAL_RANK"),
        ({**TASK, "MASTER_ADDR": " "}, "has MASTER_ADDR=' '; unset it"),
        ({**TASK, "MASTER_PORT": "70000"}, "has MASTER_PORT='70000', which is no port"),
        ({**TASK, "MASTER_PORT": ""}, "has MASTER_PORT='', which is no port"),
        ({**HOSTS, "MASTER_ADDR": "127.0.0.1"}, "'127.0.0.1', and that is each host itself, while the step has 2;"),
        ({**HOSTS, "MASTER_ADDR": "localhost"}, "MASTER_ADDR='localhost', and that is each host itself"),
        (
            {**HOSTS, "MASTER_ADDR": "192.0.2.1"},
            "begins with a.invalid, where rank 0 runs, but 192.0.2.1 is no a",
        ),
        (HOSTS, "SLURM_STEP_NODELIST begins with a.invalid: the name 'a.invalid' is not known on .*; set MASTER_ADDR"),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4", "SLURM_PROCID": "0"},
            "this job has 4 hosts, and without",
        ),
    ],
)
def test_nonsense_is_named(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(variables, monkeypatch)
    assert is_first_on_host()
    with pytest.raises(ValueError, match=message):
        take_rank_from_slurm()
        check_rank()


def test_on_another_host_its_own_address_is_not_that_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as where the name of the first host means 127.0.1.1 on every host."""
    put_in_place({**HOSTS, "SLURM_NODEID": "1", "SLURM_PROCID": "1", "MASTER_ADDR": "0.0.0.0"}, monkeypatch)
    with pytest.raises(ValueError, match=r"'0.0.0.0', and on b.invalid that means 0.0.0.0, which is b.invalid itself"):
        take_rank_from_slurm()


def test_ranks_of_torchrun_keep_what_it_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "b", "MASTER_PORT": "1234"}
    put_in_place({**HOSTS, **theirs, "TORCHELASTIC_RUN_ID": "x"}, monkeypatch)
    assert take_rank_from_slurm() is None
    assert {name: os.environ[name] for name in theirs} == theirs


def test_a_single_task_is_a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on one of several hosts of a job, where `srun` has put it."""
    alone = {**HOSTS, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "2"}
    put_in_place(alone, monkeypatch)
    assert take_rank_from_slurm() is None and "RANK" not in os.environ
    one_host = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_NNODES": "1"}
    put_in_place(one_host, monkeypatch)
    assert take_rank_from_slurm() is None and "RANK" not in os.environ, "the batch shell of a job of one host"


@pytest.mark.parametrize("what", ["a file", "a link"])
def test_what_is_in_the_way_of_the_logs_is_named(what: str, tmp_path: Path) -> None:
    """Such as a link to a disk that is not mounted: 'File exists' would say the opposite."""
    place = tmp_path / "run"
    if what == "a link":
        place.symlink_to("nowhere")
    else:
        (tmp_path / "run").mkdir()
        place = tmp_path / "run" / "logs"
        place.write_text("")
    with pytest.raises(ValueError, match=f"^{place} is no folder, but a file or a link that leads nowhere; remove it"):
        launch_ranks(1, [], logs=tmp_path / "run" / "logs")
