"""Means over seeds with their standard errors, and two variants compared question by question.

scipy does the arithmetic. Its random numbers have a fixed seed, so that the same answers give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9999
CONFIDENCE = 0.95
_SEED = 0
_BATCH = 200
"""Resamples that are in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    error: float | None
    """The standard error of the mean, from the spread of the seeds; None: there is one seed."""


@dataclass(frozen=True)
class PairedTest:
    """The difference of two variants over the same questions."""

    questions: int
    difference: float
    """Mean over questions of ours minus theirs."""
    low: float
    high: float
    """The ends of its confidence interval: percentiles of the means of questions drawn with replacement."""
    p_value: float
    """The share of sign flips of the differences whose mean is at least as far from zero, on either side."""


def estimate(values: Sequence[float]) -> Estimate:
    """Computes the mean and s / sqrt(n), where s is the standard deviation with n - 1 in its denominator."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Estimate(float(array.mean()), error)


def paired_test(ours: Sequence[float], theirs: Sequence[float]) -> PairedTest:
    """Compares two variants that have answered the same questions.

    Args:
        ours: the accuracy of each question.
        theirs: the same of the other variant, in the same order.

    Raises:
        ValueError: there are no questions, or not the same number of them.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} questions cannot be paired")
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    low, high = _interval(differences)
    return PairedTest(len(differences), float(differences.mean()), low, high, _sign_flip_p_value(differences))


def _sign_flip_p_value(differences: np.ndarray) -> float:
    """Tests that each difference could as well have had the other sign: exactly, if there are at most RESAMPLES flips.

    Questions without a difference are left out: no flip changes them.
    """
    unequal = differences[differences != 0]
    if len(unequal) < 2:  # no flip, or a single one, changes how far the mean is from zero
        return 1.0
    # scipy flips signs by exchanging the members of a pair, here of the difference and zero.
    found = stats.permutation_test(
        (unequal, np.zeros_like(unequal)),
        lambda ours, theirs, axis: np.sum(ours - theirs, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        rng=np.random.default_rng(_SEED),
    )
    return float(found.pvalue)


def _interval(differences: np.ndarray) -> tuple[float, float]:
    if np.ptp(differences) == 0:  # also a single question; scipy would warn
        return float(differences[0]), float(differences[0])
    found = stats.bootstrap(
        (differences,),
        np.mean,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
