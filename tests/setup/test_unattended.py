"""A requeued job with a damaged checkpoint takes the next older whole one; whoever can be asked is asked."""

from __future__ import annotations

import pytest

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.setup.unattended import older_instead
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint

DAMAGED = DamagedCheckpoint("a file is missing")


def choose(error: ValueError, step: int, *, broken: tuple[int, ...] = (), **settings: object) -> int | None:
    def check(step: int) -> None:
        if step in broken:
            raise ValueError("this one, too")

    return older_instead(error, step, [2, 4, 6, 8], check, config=TrainerConfig.model_validate(settings))


@pytest.mark.parametrize(
    ("restarts", "expected"), [(None, False), ("", False), ("0", False), ("1", True), ("12", True)]
)
def test_a_restart_of_the_job_is_unattended(
    restarts: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts or "")
    if restarts is None:
        monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert choose(DAMAGED, 8) == (6 if expected else None)


def test_the_newest_older_one_that_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert choose(DAMAGED, 8, broken=(6,)) == 4
    assert choose(DAMAGED, 6) == 4, "never a later one"
    assert choose(DAMAGED, 2) is None
    assert choose(DAMAGED, 8, broken=(2, 4, 6)) is None


def test_what_a_person_has_chosen_or_can_mend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert choose(DAMAGED, 8, resume_step=8) is None
    assert choose(ValueError("written with other sizes"), 8) is None
