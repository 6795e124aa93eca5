"""The outcome of a kill, without a cluster: no step counts that was done before it, and no restart."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.reliability import kills
from tests.reliability.kills import Disturber, Round


@pytest.fixture
def disturber(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disturber:
    """Returns one whose run has metrics up to step 4, and whose job was requeued twice."""
    victim: Any = SimpleNamespace(pid=7, kill=lambda: None)
    monkeypatch.setattr(kills.victims, "find", lambda cluster, kind, choose: victim)
    monkeypatch.setattr(kills, "KINDS", (kills.victims.RANK,))
    monkeypatch.setattr(kills, "last_step", lambda run: 4)
    monkeypatch.setattr(kills, "job_of", lambda cluster, job_id: SimpleNamespace(restarts=2))
    cluster: Any = None
    return Disturber(
        cluster,
        digits=tmp_path,
        expected=tmp_path,
        scratch=tmp_path,
        rng=random.Random(0),
        gap_seconds=(1, 2),
        tell=print,
    )


def test_a_step_that_was_done_before_is_no_recovery(disturber: Disturber, tmp_path: Path) -> None:
    """A restart drops the metrics of step 5, which had no checkpoint. A second kill then had "recovered" at once."""
    this, job = Round(1), kills.job_of(disturber._cluster, "1")
    disturber._kill_one(this, "1", tmp_path, step=5)
    disturber._note_recoveries(this, 5, job)
    assert this.kills[0].recovered_after is None
    disturber._note_recoveries(this, 6, job)
    assert this.kills[0].recovered_after is not None


def test_a_restart_before_the_kill_is_not_its_own(disturber: Disturber, tmp_path: Path) -> None:
    """The search for a victim takes up to SEARCH_SECONDS, in which the job may be requeued for the kill before."""
    this = Round(1)
    disturber._kill_one(this, "1", tmp_path, step=4)
    disturber._note_recoveries(this, 4, kills.job_of(disturber._cluster, "1"))
    assert not this.kills[0].job_restarted
