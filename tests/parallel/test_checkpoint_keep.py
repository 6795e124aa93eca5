"""The checkpoints that stay: the newest ones, and the best besides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps, set_aside_after
from megatron_vppo.parallel.checkpoint_keep import BEST, Best, forget_best_after, keep_checkpoints, read_best


def write(folder: Path, step: int, *, accuracy: float | None = None, keep: int = -1) -> list[int]:
    """Returns the steps that are there after that one."""
    (folder / f"global_step_{step}").mkdir()
    (folder / f"global_step_{step}" / "file").write_text("x")
    keep_checkpoints(folder, step=step, accuracy=accuracy, keep=keep)
    return checkpoint_steps(folder)


def best(step: int, accuracy: float) -> Best:
    return Best.model_validate({"step": step, "val/accuracy": accuracy})


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, [[2], [4], [6], [8]]),
        (2, [[2], [2, 4], [4, 6], [6, 8]]),
        (4, [[2], [2, 4], [2, 4, 6], [2, 4, 6, 8]]),
        (-1, [[2], [2, 4], [2, 4, 6], [2, 4, 6, 8]]),
    ],
)
def test_the_newest_stay(keep: int, left: list[list[int]], tmp_path: Path) -> None:
    assert [write(tmp_path, step, keep=keep) for step in (2, 4, 6, 8)] == left
    assert read_best(tmp_path) is None and not (tmp_path / BEST).exists()


def test_the_best_stays_besides(tmp_path: Path) -> None:
    accuracies = {2: 0.4, 4: 0.5, 6: 0.3, 8: None, 10: 0.5, 12: 0.6, 14: 0.1}
    left = {step: write(tmp_path, step, accuracy=value, keep=1) for step, value in accuracies.items()}
    # 10 is only as good as 4, which stays. The best is not counted twice when it is the newest.
    assert left == {2: [2], 4: [4], 6: [4, 6], 8: [4, 8], 10: [4, 10], 12: [12], 14: [12, 14]}
    assert json.loads((tmp_path / BEST).read_text()) == {"step": 12, "val/accuracy": 0.6}


def test_the_best_may_be_among_the_newest(tmp_path: Path) -> None:
    assert [write(tmp_path, step, accuracy=value, keep=2) for step, value in ((2, 0.1), (4, 0.9), (6, 0.2), (8, 0.3))][
        -2:
    ] == [[4, 6], [4, 6, 8]]


def test_one_that_is_gone_is_the_best_no_longer(tmp_path: Path) -> None:
    for step, accuracy in ((2, 0.4), (4, 0.9)):
        write(tmp_path, step, accuracy=accuracy)
    set_aside_after(tmp_path, 2)
    write(tmp_path, 3, accuracy=0.1)
    assert read_best(tmp_path) == best(3, 0.1), "what step 2 had is not known any more"


def test_one_that_is_set_aside_is_forgotten_before_its_name_is_used_again(tmp_path: Path) -> None:
    for step, accuracy in ((2, 0.4), (4, 0.9)):
        write(tmp_path, step, accuracy=accuracy)
    forget_best_after(tmp_path, 4)
    assert read_best(tmp_path) == best(4, 0.9)
    forget_best_after(tmp_path, 2)
    assert read_best(tmp_path) is None and not (tmp_path / BEST).exists()
    forget_best_after(tmp_path, 2)


def test_one_that_is_written_again(tmp_path: Path) -> None:
    """A run that is asked to stop before its next step saves the step that it went on from once more."""
    write(tmp_path, 3, accuracy=0.7)
    keep_checkpoints(tmp_path, step=3, accuracy=None, keep=1)
    assert read_best(tmp_path) == best(3, 0.7)
    keep_checkpoints(tmp_path, step=3, accuracy=0.6, keep=1)
    assert read_best(tmp_path) == best(3, 0.6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"best\.json is damaged \(Expecting property name.*\); remove it"),
        ("[]", r"best\.json is damaged \(holds list, not a JSON object\); remove it"),
        ('{"step": 4}', r"best\.json is damaged \(lacks val/accuracy\); remove it"),
        ('{"step": "4", "val/accuracy": 0.5}', r"best\.json is damaged \(has step='4': .*\); remove it"),
    ],
)
def test_a_damaged_note_says_so(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / BEST).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_best(tmp_path)
