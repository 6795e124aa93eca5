"""Waits, copies and bytes of scoring and update, counted on a pretended device (tools/bench/pretend_device.py)."""

from __future__ import annotations

import pytest
from bench.waste_bars import Bar, Case
from bench.waste_waits import BYTES_PER_TOKEN, COPIES, PIXEL_SHARE, WAITS_OF_CALL, waits

LIMITS = {
    3: {"between micro-batches": 0, "of a call with 4": WAITS_OF_CALL},
    4: {"bytes": PIXEL_SHARE, "blocking copies": 0, "copies of a micro-batch": COPIES},
    5: {"": BYTES_PER_TOKEN},
}
PHASES = 10
"""Both families: two kinds of scoring with a perturbation per image and per row, and the update."""


@pytest.fixture(scope="module")
def bars() -> dict[int, Bar]:
    return {bar.number: bar for bar in waits()}


@pytest.mark.parametrize("number", LIMITS)
def test_nothing_waits_and_little_is_sent(number: int, bars: dict[int, Bar]) -> None:
    cases = bars[number].cases
    assert len(cases) == PHASES * len(LIMITS[number])
    assert [case for case in cases if case.value > limit(case, number)] == []


def limit(case: Case, number: int) -> float:
    return next(most for words, most in LIMITS[number].items() if case.name.endswith(words))


def test_every_phase_is_seen_to_send_its_pixels(bars: dict[int, Bar]) -> None:
    """Otherwise nothing would be counted, and nothing could exceed a limit."""
    shares = [case.value for case in bars[4].cases if case.name.endswith("bytes")]
    assert shares == [pytest.approx(1.0, abs=1e-6)] * PHASES
    assert all(case.value >= 1 for case in bars[4].cases if case.name.endswith("copies of a micro-batch"))
