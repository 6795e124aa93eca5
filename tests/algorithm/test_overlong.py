"""DAPO's Eq. 13, by hand: its own numbers, a limit of 20,480 tokens of which 4,096 are the buffer."""

from __future__ import annotations

import pytest

from megatron_vppo.algorithm.overlong import overlong_reward


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 0), (16_384, 0), (16_385, -1 / 4096), (18_432, -0.5), (20_479, -4095 / 4096), (20_480, -1), (30_000, -1)],
)
def test_grows_over_the_last_tokens(length: int, expected: float) -> None:
    assert overlong_reward(length, most=20_480, buffer=4_096) == expected
