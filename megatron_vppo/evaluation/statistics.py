"""The figures of a benchmark from its graded samples: avg@k, pass@k and majority@k with their confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vppo.evaluation.grading import GradedSample
from megatron_vppo.evaluation.question import Question


@dataclass(frozen=True, slots=True)
class Measure:
    """A mean over questions."""

    mean: float
    """In [0, 1]."""
    low: float
    high: float
    """The ends of its 95 % confidence interval."""
    questions: int


@dataclass(frozen=True)
class WorstCase:
    """The questions of a benchmark of which each has variants (DynaMath)."""

    average: Measure
    """The mean over groups of variants of the mean accuracy within one."""
    worst: Measure
    """The share of groups right in all variants: mean over samples k of whether sample k is right in every variant."""


@dataclass(frozen=True)
class BenchmarkResult:
    """The figures of one model on one benchmark."""

    samples: int
    """Samples per question: the n of avg@n, majority@n and of the estimates of pass@k."""
    average: Measure
    """avg@n."""
    pass_at: Mapping[int, Measure]
    """pass@k by k."""
    majority: Measure
    """majority@n."""
    answered: float
    """The share of responses in which an answer was found."""
    categories: Mapping[str, Mapping[str, Measure]]
    """avg@n by name of the category and its value."""
    worst_case: WorstCase | None
    """None: the benchmark has no variants."""


def summarise(questions: Sequence[Question], graded: Sequence[Sequence[GradedSample]]) -> BenchmarkResult:
    """Computes all figures of a benchmark.

    Args:
        graded: for each question, in the same order, its samples in their order; of each as many.

    Raises:
        ValueError: there are no questions, or not as many samples of each.
    """
    raise NotImplementedError
