"""The numbers by which a process learns which rank it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.cli.launch import check_rank, is_first_on_host, launch_ranks, take_rank_from_slurm

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NNODES",
)  # fmt: skip


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
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "x"}, "has SLURM_NNODES='x', which"),
    ],
)
def test_nonsense_is_named(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_on_host()
    with pytest.raises(ValueError, match=message):
        take_rank_from_slurm()
        check_rank()


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
