"""Names of attempts, the same on every rank, and their folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vppo.system.attempt import attempt_name, link_latest, make_attempt_folder

SRUN = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "my run/1", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"VPPO_ATTEMPT": "attempt_3", **SRUN, **TORCHRUN}, "attempt_3"),
        (SRUN, "job_4711_0"),
        ({**SRUN, "SLURM_RESTART_COUNT": "2"}, "job_4711_2"),
        ({**SRUN, "VPPO_ATTEMPT": "", "SLURM_RESTART_COUNT": ""}, "job_4711_0"),
        ({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "1"}, "job_4711_1_step_3"),
        (TORCHRUN, "torchrun_my-run-1_2"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun_none_0"),
        ({**TORCHRUN, "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "1"}, "torchrun_my-run-1_2_job_9_0"),
        ({}, "unnamed"),
    ],
)
def test_ranks_find_the_name_in_their_environment(environment: dict[str, str], name: str) -> None:
    assert attempt_name(environment) == name


@pytest.mark.parametrize("name", ["../logs", "a/b", "latest", ".hidden", "a b"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^the environment has VPPO_ATTEMPT='{name}'; it names a folder"):
        attempt_name({"VPPO_ATTEMPT": name})
    with pytest.raises(ValueError, match="VPPO_ATTEMPT"):
        make_attempt_folder(tmp_path, name=name)


def test_the_next_number_is_above_all_that_are_there(tmp_path: Path) -> None:
    assert make_attempt_folder(tmp_path, name=None) == "attempt_1"
    (tmp_path / "attempt_9").mkdir()
    (tmp_path / "attempt_10").write_text("a file in its place")
    (tmp_path / "attempt_x").mkdir()
    assert make_attempt_folder(tmp_path, name=None) == "attempt_11"
    assert (tmp_path / "attempt_11").is_dir()
    assert make_attempt_folder(tmp_path, name="attempt_9") == "attempt_9"


def test_two_that_begin_at_once_get_two_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_attempt_folder(tmp_path, name=None)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # the other has not made its folder when we look
    assert make_attempt_folder(tmp_path, name=None) == "attempt_2"


def test_the_link_leads_to_the_newest(tmp_path: Path) -> None:
    for name in ("attempt_1", "attempt_2"):
        (tmp_path / name).mkdir()
        link_latest(tmp_path, name)
        assert (tmp_path / "latest").resolve() == tmp_path / name
    assert os.readlink(tmp_path / "latest") == "attempt_2", "it stays right where the run folder is moved"
    assert {path.name for path in tmp_path.iterdir()} == {"attempt_1", "attempt_2", "latest"}


def test_where_there_can_be_no_link_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "of a user").write_text("")
    link_latest(tmp_path, "attempt_1")
    link_latest(tmp_path / "nowhere", "attempt_1")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
