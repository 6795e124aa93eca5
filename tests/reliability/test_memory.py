"""The line through a process's memory: noise is no growth, and a leak is."""

from __future__ import annotations

import random

import pytest

from tests.reliability.memory import growth_of


def noisy(slope_kib: float, seed: int) -> list[float]:
    """MiB after each of 300 steps: a warm-up of 50 MiB, noise of 2 MiB, and a slope."""
    rng = random.Random(seed)
    return [500 + min(i, 80) * 50 / 80 + rng.gauss(0, 2) + i * slope_kib / 1024 for i in range(300)]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_flat(seed: int) -> None:
    growth = growth_of("rank", noisy(0.0, seed))
    assert growth.is_flat and abs(growth.mean_mib - 550) < 1 and growth.steps == 200


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_of_one_image_a_step_grows(seed: int) -> None:
    """112 x 56 pixels of 4 bytes and 3 colors."""
    growth = growth_of("rank", noisy(73.5, seed))
    assert not growth.is_flat and growth.slope_kib == pytest.approx(73.5, abs=4 * growth.error_kib)


@pytest.mark.parametrize("seed", range(3))
def test_a_peak_that_goes_back_hides_no_leak(seed: int) -> None:
    peak = [value + 90 * (200 <= i < 212) for i, value in enumerate(noisy(73.5, seed))]
    without_rise = growth_of("rank", peak).without_rise
    assert without_rise is not None and without_rise.slope_kib > 40


def test_a_staircase_grows() -> None:
    """Noise of zero: one page more every tenth step."""
    assert not growth_of("worker", [100 + i // 10 * 0.1 for i in range(300)]).is_flat


def test_a_page_here_and_there_is_flat() -> None:
    assert growth_of("worker", [100 + i // 100 * 4 / 1024 for i in range(300)]).is_flat


@pytest.mark.parametrize("step", [110, 200, 213, 290])
def test_one_rise_is_flat_and_two_are_not(step: int) -> None:
    """A reward worker of 60.4 MiB had 63.0 from step 355 of 450 on. Step 213 lies amid a stretch."""
    once = [60.4 + 2.6 * (i >= step) for i in range(300)]
    assert growth_of("worker", once).is_flat
    twice = [value + 2.6 * (i >= 250) + 2.6 * (i >= 150) for i, value in enumerate(once)]
    assert not growth_of("worker", twice).is_flat
