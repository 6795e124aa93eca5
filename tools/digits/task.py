"""The parts of a task on images of digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """The image, the question, and the worded solutions from which a cold-started model learns to answer."""

    question: str
    columns: int
    """The digits side by side."""
    digits: int
    """All digits of an image, in reading order."""
    wordings: int
    """The number of wordings to choose from, so that the responses of a cold-started model differ."""
    choices: int
    """The times that a solution chooses one: once, or once for each digit."""
    answer: Callable[[Sequence[int]], int]
    """A function of the digits: the right answer."""
    solution: Callable[[Sequence[int], Sequence[int]], str]
    """A function of the digits and the chosen wordings: a text that names all digits and boxes the answer."""
    longest_solution: int
    """An upper bound of its length in tokens, end token included."""
