"""Time limits in a row, without a cluster: when a run that goes on is not given up."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.reliability import requeues


def test_steps_after_the_last_limit_may_take_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run of 450 steps with 5 limits was given up STUCK_SECONDS after the last of them, step for step at work."""
    looks = itertools.count()

    def job_of(cluster: Any, job_id: str) -> Any:
        has_ended = next(looks) > 5
        return SimpleNamespace(state="COMPLETED" if has_ended else "RUNNING", reason="", has_ended=has_ended)

    steps = itertools.count()
    monkeypatch.setattr(requeues, "job_of", job_of)
    monkeypatch.setattr(requeues, "last_step", lambda run: next(steps))
    monkeypatch.setattr(requeues, "STUCK_SECONDS", 0.7)
    cluster: Any = None
    job, _ = requeues._meet_limits(cluster, "1", tmp_path, 0)
    assert job.has_ended
