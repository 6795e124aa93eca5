"""The first task: the sum of two handwritten digits side by side, answered in a line."""

from __future__ import annotations

from collections.abc import Sequence

from digits.task import Task

SOLUTIONS = (
    r"I see {a} and {b}. {a}+{b}=\boxed{{{s}}}",
    r"Left {a}, right {b}. Sum: \boxed{{{s}}}",
    r"{a} and {b}, so {a}+{b}=\boxed{{{s}}}",
    r"The digits are {a}, {b}: \boxed{{{s}}}",
)
"""The same reasoning in several wordings."""


def solution(digits: Sequence[int], wordings: Sequence[int]) -> str:
    """Writes a worked solution that names both digits and boxes their sum."""
    a, b = digits
    (wording,) = wordings
    return SOLUTIONS[wording].format(a=a, b=b, s=a + b)


PAIRS = Task(
    question="<image>What is the sum?",
    columns=2,
    digits=2,
    wordings=len(SOLUTIONS),
    choices=1,
    answer=sum,
    solution=solution,
    longest_solution=40,
)
