"""Rewards that fail as a whole end the run; single ones do not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vppo.algorithm.types import Reward
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.trainer.grader import Grader
from tests.algorithm.rows import response

RESPONSES = [response(2, group=group) for group in range(4)]


class Pool:
    """Fails for the first `failures` responses."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def grade(self, responses: Any) -> list[tuple[str, Reward]]:
        failed = Reward(0.0, 0.0, {}, error="TypeError: f() missing 1 required positional argument")
        return [(str(i), failed if i < self.failures else Reward(1.0, 1.0, {})) for i in range(len(responses))]


def grade(failures: int, share: float) -> list[float]:
    pool: Any = Pool(failures)
    with single_rank():
        graded = Grader(pool, max_error_share=share).grade(RESPONSES)
    assert [(item.response, item.text) for item in graded] == [(r, str(i)) for i, r in enumerate(RESPONSES)]
    return [item.reward.overall for item in graded]


def test_single_failures_are_zero() -> None:
    assert grade(3, 1.0) == [0, 0, 0, 1]
    assert grade(1, 0.5) == [0, 1, 1, 1]
    assert grade(0, 0.01) == [1, 1, 1, 1]


@pytest.mark.parametrize(("failures", "share"), [(4, 1.0), (2, 0.5), (1, 0.25), (4, 0.1)])
def test_a_share_of_failures_ends_the_run(failures: int, share: float) -> None:
    with pytest.raises(
        ValueError, match=rf"{failures} of 4 rewards failed, .* is {share:g}\)\. .* row 0: TypeError: f"
    ):
        grade(failures, share)


def test_the_end_of_a_run_says_how_the_function_is_called() -> None:
    """Most functions that fail for every response are called in the other way than they expect."""
    with pytest.raises(
        ValueError, match=r"reward\.reward_type=batch calls the function with a list, sequential with one"
    ):
        grade(4, 1.0)
    with pytest.raises(ValueError, match=r"positional argument$"):
        grade(2, 0.5)
