"""avg@k, pass@k, majority@k, worst case and intervals, against numbers worked out by hand and by other means."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from megatron_vppo.evaluation.grading import GradedSample
from megatron_vppo.evaluation.statistics import (
    Measure,
    compare,
    majority,
    measure,
    pass_at,
    suite_average,
    summarise,
)
from tests.evaluation.questions import question

EXACT = 1e-12
"""The same few additions in another order."""


def samples(text: str) -> list[GradedSample]:
    """One sample per letter: capitals are right; a dot gave no answer."""
    return [GradedSample(float(letter.isupper()), None if letter == "." else letter.lower()) for letter in text]


def test_avg_at_k_is_the_mean_over_samples_and_then_over_questions() -> None:
    found = summarise(
        [question("1"), question("2"), question("3")], [samples("Abcd"), samples("AA.A"), samples("ABCD")]
    )
    assert found.samples == 4
    assert found.average.mean == pytest.approx((0.25 + 0.75 + 1.0) / 3, rel=EXACT)
    assert found.answered == pytest.approx(11 / 12, rel=EXACT)


def test_the_error_of_a_mean_over_questions() -> None:
    values = [0.25, 0.75, 1.0, 0.5]
    found = measure(np.array(values), ["a", "b", "c", "d"])
    error = statistics.stdev(values) / 2
    assert found.error == pytest.approx(error, rel=EXACT)
    assert found.low == pytest.approx(0.625 - 3.182446305284263 * error, rel=1e-9), "t(0.975; 3) from a table"
    assert found.high == 1.0, "0.625 + 1.02 is cut"
    assert found.count == 4


def test_variants_that_stand_and_fall_together_count_once() -> None:
    """Copies of the same questions say nothing new: the error stays, where one over all rows would halve."""
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    alone = measure(np.array(values), list("abcde"))
    copied = measure(np.array(values * 4), list("abcde") * 4)
    assert copied.error == pytest.approx(alone.error, rel=EXACT)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), rel=EXACT)
    assert copied.count == 5


def test_the_clustered_error_is_that_of_drawing_clusters() -> None:
    """Against scipy's bootstrap of the ratio sum / count over clusters of unequal size."""
    random = np.random.default_rng(3)
    sizes = random.integers(1, 8, 200)
    values = np.concatenate([np.clip(random.normal(0.5, 0.3) + random.normal(0, 0.1, n), 0, 1) for n in sizes])
    names = [str(i) for i, n in enumerate(sizes) for _ in range(n)]
    ends = np.cumsum(sizes)
    sums = np.array([values[end - n : end].sum() for end, n in zip(ends, sizes, strict=True)])
    drawn = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        batch=500,
        rng=np.random.default_rng(0),
    )
    found = measure(values, names)
    # 4000 draws leave 1.1 % on a standard deviation; the linearisation of a ratio of 200 clusters leaves less.
    assert found.error == pytest.approx(float(drawn.standard_error), rel=0.05)
    assert found.error > 1.5 * values.std(ddof=1) / math.sqrt(len(values)), "rows as if they were independent"


def test_one_question_says_nothing_about_others() -> None:
    assert measure(np.array([0.5]), ["a"]) == Measure(0.5, math.inf, 0.0, 1.0, 1)


@pytest.mark.parametrize(("n", "c"), [(8, 0), (8, 1), (8, 3), (8, 8), (5, 2), (1, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int) -> None:
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at(k, n, c) == pytest.approx(sum(map(any, draws)) / len(draws), rel=EXACT)


def test_pass_at_k_is_given_for_powers_of_two_and_all_samples() -> None:
    found = summarise([question("1"), question("2")], [samples("Abbbbb"), samples("AAbbbb")])
    assert list(found.pass_at) == [1, 2, 4, 6]
    assert found.pass_at[1].mean == pytest.approx(found.average.mean, rel=EXACT)
    # 1 of 6: 2/6; 2 of 6: 1 - C(4, 2) / C(6, 2) = 9/15.
    assert found.pass_at[2].mean == pytest.approx((2 / 6 + 9 / 15) / 2, rel=EXACT)


@pytest.mark.parametrize(
    ("letters", "right"),
    [
        ("Abb", 0.0),
        ("bAA", 1.0),
        ("bAbA", 0.0),  # a tie: b came first
        ("AbAb", 1.0),
        ("..bA.A", 1.0),  # three without an answer are no majority
        ("...", 0.0),
        ("..A", 1.0),
        ("aAAb", 1.0),  # one answer, which the grader found right in two of three samples
        ("Aaab", 0.0),
        ("aA", 0.0),  # as often: the first
        ("Aa", 1.0),
    ],
)
def test_majority(letters: str, right: float) -> None:
    assert majority(samples(letters)) == right
    assert summarise([question("1")], [samples(letters)]).majority.mean == right


def test_categories_in_the_order_of_their_first_question() -> None:
    questions = [question("1", subject="b"), question("2", subject="a"), question("3", subject="b"), question("4")]
    found = summarise(questions, [samples("A"), samples("b"), samples("b"), samples("A")]).categories
    assert list(found["subject"]) == ["b", "a"]
    assert found["subject"]["b"].mean == 0.5
    assert found["subject"]["b"].count == 2
    assert found["subject"]["a"].mean == 0.0


def test_the_worst_case_is_right_in_every_variant() -> None:
    """Two samples: the first is right in all variants of q1, the second in none of its first; q2 fails once each."""
    questions = [question(f"{q}.{v}", variant_of=q) for q in ("q1", "q2") for v in range(3)]
    graded = [samples("Ab"), samples("AA"), samples("AA"), samples("bA"), samples("Ab"), samples("AA")]
    found = summarise(questions, graded).worst_case
    assert found is not None
    assert found.worst.mean == pytest.approx((0.5 + 0.0) / 2, rel=EXACT)
    assert found.average.mean == pytest.approx((5 / 6 + 4 / 6) / 2, rel=EXACT)
    assert found.worst.count == 2
    assert summarise([question("1")], [samples("A")]).worst_case is None


def test_the_average_of_a_suite_gives_each_benchmark_the_same_weight() -> None:
    found = suite_average([Measure(0.5, 0.03, 0, 1, 100), Measure(0.7, 0.04, 0, 1, 3000)])
    assert found.mean == pytest.approx(0.6, rel=EXACT)
    assert found.error == pytest.approx(0.025, rel=EXACT)
    assert found.high == pytest.approx(0.6 + 1.959963984540054 * 0.025, rel=1e-9)


def test_two_models_are_compared_question_by_question() -> None:
    questions = [question("1"), question("2"), *(question(f"v{i}", variant_of="q") for i in range(4))]
    better = [samples("AA"), samples("Ab"), *[samples("AA")] * 4]
    worse = [samples("Ab"), samples("Ab"), *[samples("bb")] * 4]
    found = compare(questions, better, worse)
    assert found.questions == 3, "variants are one unit"
    assert found.difference == pytest.approx((0.5 + 0 + 1) / 3, rel=EXACT)
    assert found.p_value == pytest.approx(2 / 4, rel=EXACT), "two unequal units: 2 of 4 sign flips"


def test_samples_that_do_not_fit_the_questions() -> None:
    with pytest.raises(ValueError, match=r"1 questions have 2 lists of samples, of \[1\] samples"):
        summarise([question("1")], [samples("A"), samples("A")])
    with pytest.raises(ValueError, match=r"of \[1, 2\] samples"):
        summarise([question("1"), question("2")], [samples("A"), samples("AA")])
    with pytest.raises(ValueError, match="0 questions"):
        summarise([], [])
