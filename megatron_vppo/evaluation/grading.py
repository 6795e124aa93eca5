"""Grades of responses to benchmark questions, and the answers that they gave, as votes of a majority.

Pure functions of texts. sympy may take forever over a hostile response, so callers run them in processes with a limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.evaluation.question import GradingRule


@dataclass(frozen=True, slots=True)
class GradedSample:
    """One graded response to a question."""

    accuracy: float
    """1.0: right; 0.0: wrong."""
    vote: str | None
    """The answer found in the response, in the spelling that votes are counted by; None: no answer was found."""


def grade(response: str, answer: str, *, rule: GradingRule) -> GradedSample:
    """Grades a response by the rule of its question.

    Raises ValueError for an answer that the rule cannot be used for.
    """
    raise NotImplementedError


def check_answer(answer: str, *, rule: GradingRule) -> None:
    """Raises ValueError for an answer that the rule cannot be used for."""
    grade("", answer, rule=rule)
