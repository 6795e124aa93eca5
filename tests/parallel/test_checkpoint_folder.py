"""The folder of checkpoints: what it has, and what a resume from an older one leaves of the newer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps, set_aside_after


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "mark").write_text(name)


def test_steps_are_those_of_the_folders(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path / "none") == []
    make(
        tmp_path, "global_step_10", "global_step_9", ".global_step_11.tmp", "global_step_x", "set_aside_global_step_12",
        "global_step_007", "global_step_-1", "global_step_1e3", "global_step_٩",
    )  # fmt: skip
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("13")
    assert checkpoint_steps(tmp_path) == [9, 10]


@pytest.mark.parametrize(
    ("target", "message"), [("nowhere", r"nowhere, which is not there"), ("checkpoints", "cannot be read: Too many")]
)
def test_a_link_that_leads_nowhere_is_not_taken_for_no_checkpoints(target: str, message: str, tmp_path: Path) -> None:
    """Such as one to a disk that is not mounted. The run would start from the beginning and cut its lines."""
    (tmp_path / "checkpoints").symlink_to(target)
    with pytest.raises(ValueError, match=rf"/checkpoints .*{message}"):
        checkpoint_steps(tmp_path / "checkpoints")


def test_later_checkpoints_are_kept_under_names_that_nothing_looks_for(tmp_path: Path) -> None:
    make(tmp_path, "global_step_2", "global_step_4", "global_step_6")
    names = [path.name for path in set_aside_after(tmp_path, 2)]
    assert names == ["set_aside_global_step_4", "set_aside_global_step_6"]
    assert (tmp_path / names[0] / "mark").read_text() == "global_step_4"
    assert checkpoint_steps(tmp_path) == [2] and set_aside_after(tmp_path, 2) == []


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        make(tmp_path, "global_step_4")
        (tmp_path / "global_step_4" / "mark").write_text(str(number))
        set_aside_after(tmp_path, 2)
    marks = {path.parent.name: path.read_text() for path in tmp_path.glob("*/mark")}
    assert marks == {f"set_aside_global_step_4{end}": str(n) for n, end in ((1, ""), (2, ".2"), (3, ".3"))}
