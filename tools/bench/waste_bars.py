"""The form of waste.py's table: a bar, and the numbers that are held against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One number of a bar."""

    name: str
    value: float
    limit: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Bar:
    """One line of the table."""

    number: int
    """The line's number; a line may hold only some of the cases of a bar."""
    words: str
    cases: tuple[Case, ...]
    where: dict[str, Any] | None = None
    """Lines, names or sizes that explain the numbers."""

    def report(self) -> dict[str, Any]:
        """Returns the bar as JSON."""
        cases = {
            case.name: {"value": _digits(case.value), "limit": _digits(case.limit), "met": case.is_met}
            for case in self.cases
        }
        found = {"bar": self.number, "words": self.words, "met": all(case.is_met for case in self.cases)}
        return {**found, "cases": cases, **({"where": self.where} if self.where else {})}


Measure = Callable[[], Sequence[Bar]]
"""Counts the numbers of some bars, in a process that holds nothing else."""


def _digits(value: float) -> float:
    """Rounds to five significant digits; whole numbers stay as they are."""
    return int(value) if value == int(value) else float(f"{value:.5g}")
