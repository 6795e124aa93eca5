"""A reward that a model of random weights can learn in a few steps, given as a user's own function."""

from __future__ import annotations

from typing import Any


def starts_small(answers: list[dict[str, Any]]) -> list[float]:
    """1 for an answer whose first character is a lower-case letter; about a quarter of random ones are."""
    return [float(answer["response"][:1].islower()) for answer in answers]


def one_starts_small(answer: dict[str, Any]) -> float:
    """The same for `reward.reward_type=sequential`."""
    return starts_small([answer])[0]


def half_for_a_small_start(answer: dict[str, Any]) -> float:
    """A quarter, or three quarters for such an answer: no group is all right or all wrong."""
    return 0.25 + one_starts_small(answer) / 2
