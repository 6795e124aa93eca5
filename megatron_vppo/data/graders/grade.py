"""The record that every built-in grader returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grade:
    """A grader's verdict on one response."""

    reward: float
    """In [0, 1]."""
    accuracy: float
    """In [0, 1]: it decides which groups are kept, and validation reports it."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, which become metrics."""


def verdict(right: bool, *, answered: bool) -> Grade:
    """Returns the grade of a response that is right or wrong, with the detail if an answer was found in it at all."""
    return Grade(reward=float(right), accuracy=float(right), details={"answered": float(answered)})
