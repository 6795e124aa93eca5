"""The decision to stop: who is asked, at which boundary, and what still fits."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vppo.system.stop_signals import StopRequested
from megatron_vppo.trainer import stopping as module
from megatron_vppo.trainer.stopping import Stopping


def make(
    asked_seconds_ago: float | None = None,
    *,
    end_in: float | None = None,
    others: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Stopping:
    """Makes the decision of a rank that was asked so long ago, in a world where `others` are asked or not."""
    signals: Any = SimpleNamespace(
        request=None if asked_seconds_ago is None else signal.SIGUSR2, seconds_since_request=asked_seconds_ago or 0.0
    )
    return Stopping(
        signals,
        end_time=None if end_in is None else time.time() + end_in,
        stop_within_seconds=100.0,
        any_rank=lambda mine: mine or others,
        warn=warn,
    )


def took(stopping: Stopping, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> Stopping:
    for part, duration in seconds.items():
        clock = iter([0.0, duration])
        with monkeypatch.context() as patch:
            patch.setattr(module.time, "monotonic", lambda clock=clock: next(clock))
            with stopping.durations.time(part):  # type: ignore[arg-type]
                pass
    return stopping


@pytest.mark.parametrize("others", [False, True])
def test_all_ranks_leave_if_one_was_asked(others: bool) -> None:
    asked, not_asked = make(1.0), make(None, others=others)
    assert asked.wanted() and asked.before_step() and asked.reason == "on request (SIGUSR2)"
    assert not not_asked.wanted() and not_asked.before_step() is others
    with pytest.raises(StopRequested):
        asked.at_scoring()
    if others:
        for boundary in (not_asked.at_scoring, not_asked.before_update):
            with pytest.raises(StopRequested):
                boundary()
    else:
        not_asked.at_scoring()
        not_asked.before_update()


def test_an_update_is_begun_only_if_it_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StopRequested):  # nobody knows how long one takes
        make(1.0).before_update()
    took(make(40.0), monkeypatch, update=60.0).before_update()
    with pytest.raises(StopRequested):
        took(make(40.0), monkeypatch, update=60.1).before_update()
    took(make(None), monkeypatch, update=1000.0).before_update()


def test_a_step_that_the_job_would_not_see_the_end_of_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not make(end_in=1.0).before_step(), "the first step is begun: nobody knows how long one takes"
    left = 40.0 + 20.0 + module.TIME_LIMIT_MARGIN_SECONDS
    for more, stops in ((5.0, False), (-5.0, True)):
        stopping = took(make(end_in=left + more), monkeypatch, step=40.0)
        took(took(stopping, monkeypatch, step=10.0), monkeypatch, checkpoint=20.0)
        assert stopping.before_step() is stops, "the longest of recent steps counts"
    assert stopping.reason == "because the job ends in 85 s, and a step with its checkpoint takes 90 s"
    forgotten = took(make(end_in=left), monkeypatch, step=1000.0)
    for _ in range(module.RECENT_STEPS):
        took(forgotten, monkeypatch, step=40.0)
    assert not forgotten.before_step()


def test_a_part_that_fails_is_not_counted() -> None:
    stopping = make()
    with pytest.raises(KeyError), stopping.durations.time("update"):
        raise KeyError
    assert stopping.durations.longest("update") is None


# --- Warnings ---------------------------------------------------------------------------------------------------------

RAISE = "trainer.stop_within_seconds, and the time before the job's limit (--grace-seconds of vppo slurm), above that"


def test_a_part_that_takes_too_long_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    stopping = make(warn=said.append)
    took(stopping, monkeypatch, step=1000.0, update=100.0, checkpoint=99.0)
    assert said == [], "a step has boundaries in it, and the others end in time"
    took(took(stopping, monkeypatch, update=123.4), monkeypatch, update=500.0)
    too_long = "longer than trainer.stop_within_seconds=100: if the run is asked to stop meanwhile, it stops too late."
    assert said == [f"the update took 123 s, {too_long} Lower data.rollout_batch_size, or raise {RAISE}"]
    for part in ("weight sync", "checkpoint"):
        took(stopping, monkeypatch, **{part: 101.0})
    assert said[1:] == [
        f"the weight sync took 101 s, {too_long} Raise {RAISE}",
        f"the checkpoint took 101 s, {too_long} Put trainer.runs_dir on faster storage, or raise {RAISE}",
    ]
    took(make(warn=None), monkeypatch, update=500.0)  # another rank says it


def test_a_stop_that_comes_too_late_is_told() -> None:
    said: list[str] = []
    for asked in (None, 100.0, 101.0):
        make(asked, warn=said.append).leaving()
    make(101.0).leaving()
    assert said == [
        "the run was asked to stop 101 s ago, longer than trainer.stop_within_seconds=100, and only now leaves its "
        f"step. Raise {RAISE}"
    ]
