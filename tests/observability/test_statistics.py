"""Means, sign flips and intervals, against numbers counted out by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from megatron_vppo.observability.statistics import PairedTest, estimate, paired_test

EXACT = 1e-12
"""The same few additions in another order."""


def test_the_standard_error_is_that_of_the_mean() -> None:
    values = [0.61, 0.66, 0.70]
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.fmean(values), rel=EXACT)
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(3), rel=EXACT)
    assert estimate([0.5]).error is None


def sign_flips(differences: list[float]) -> float:
    """The share of all 2^n sign flips whose sum is at least as far from zero."""
    far = abs(sum(differences)) - EXACT
    flips = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in
             itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return sum(abs(total) >= far for total in flips) / len(flips)


@pytest.mark.parametrize(
    "differences",
    [
        [0.25, 0.5, 0.125, 0.75, 0.5, 0.25],  # all on one side: 2 of 64 flips
        [0.5, -0.25, 0.5, 0.125, -0.125, 1.0, 0.375],
        [-0.5, 0.5],
        [-0.3, -0.1, -0.2, 0.1, -0.7, -0.4, 0.2, -0.1],
        [1.0],
    ],
)
def test_few_questions_are_tested_exactly(differences: list[float]) -> None:
    theirs = [0.5] * len(differences)
    ours = [d + t for d, t in zip(differences, theirs, strict=True)]
    found = paired_test(ours, theirs)
    expected = sign_flips(differences)
    assert found.p_value == pytest.approx(expected, rel=EXACT)
    assert found.difference == pytest.approx(statistics.fmean(differences), abs=EXACT)
    assert paired_test(theirs, ours).p_value == pytest.approx(expected, rel=EXACT), "either side counts"


def test_equal_questions_count_for_the_mean_and_not_for_the_flips() -> None:
    """Five better ones among 1000: 2 of 32 flips, however many are equal."""
    ours, theirs = [1.0] * 5 + [0.5] * 995, [0.0] * 5 + [0.5] * 995
    found = paired_test(ours, theirs)
    assert found.p_value == pytest.approx(2 / 32, rel=EXACT)
    assert found.difference == pytest.approx(5 / 1000, rel=EXACT)
    assert found.questions == 1000


def test_many_questions_agree_with_the_normal_approximation() -> None:
    """400 questions: p and interval of a normal distribution with the variance of the differences. 9999 resamples
    leave a standard error of 0.005 on p, and a twentieth of the standard error on the ends of the interval.
    """
    random = np.random.default_rng(7)
    differences = random.normal(0.02, 0.2, 400)
    theirs = random.uniform(0, 1, 400)
    found = paired_test((theirs + differences).tolist(), theirs.tolist())
    normal = statistics.NormalDist()
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(400)
    flip_error = math.sqrt(sum(d * d for d in differences)) / 400
    assert found.p_value == pytest.approx(2 * (1 - normal.cdf(abs(mean) / flip_error)), abs=0.02)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.05 * error * 2)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.05 * error * 2)
    assert paired_test((theirs + differences).tolist(), theirs.tolist()) == found, "the seed is fixed"


def test_no_difference_at_all() -> None:
    assert paired_test([0.5, 1.0], [0.5, 1.0]) == PairedTest(2, 0.0, 0.0, 0.0, 1.0)
    assert paired_test([1.0, 0.5], [0.5, 0.0]) == PairedTest(2, 0.5, 0.5, 0.5, 0.5)


def test_questions_that_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="2 and 1 questions cannot be paired"):
        paired_test([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="0 and 0 questions"):
        paired_test([], [])
