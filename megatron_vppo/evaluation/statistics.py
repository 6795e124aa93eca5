"""The figures of a benchmark from its graded samples: avg@k, pass@k and majority@k with their confidence intervals.

Every figure is a mean over questions. Its interval is the mean -/+ Student's t times the standard error, cut to [0, 1].
Questions are the sample here: the interval says how far another set of such questions would take the mean, and not only
how far other seeds would. Variants of one question stand or fall together, so the error is clustered by `variant_of`:
deviations from the mean are added up within a cluster before they are squared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megatron_vppo.evaluation.grading import GradedSample
from megatron_vppo.evaluation.question import Question
from megatron_vppo.observability.statistics import CONFIDENCE, PairedTest, paired_test

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measure:
    """A mean over questions, or over clusters of their variants."""

    mean: float
    """In [0, 1]."""
    error: float
    """The standard error of the mean; infinite if there is a single question or cluster."""
    low: float
    high: float
    """The ends of its 95 % confidence interval, within [0, 1]."""
    count: int
    """Questions, or clusters, that the mean is over."""


@dataclass(frozen=True, slots=True)
class WorstCase:
    """The figures of questions that have variants (DynaMath's worst-case accuracy, arXiv 2411.00836)."""

    average: Measure
    """The mean over questions of the mean accuracy of their variants."""
    worst: Measure
    """The share of questions right in every variant: by sample number, as if each were a run of its own, and then the
    mean over samples."""


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The figures of one model on one benchmark."""

    samples: int
    """Samples per question: the n of avg@n, of majority@n and of the estimates of pass@k."""
    average: Measure
    """avg@n."""
    pass_at: Mapping[int, Measure]
    """pass@k by k: powers of two up to n, and n."""
    majority: Measure
    """majority@n."""
    answered: float
    """The share of samples in which an answer was found."""
    categories: Mapping[str, Mapping[str, Measure]]
    """avg@n by name of a category and by its value, both in the order of their first question."""
    worst_case: WorstCase | None
    """None: no question has variants."""


def summarise(questions: Sequence[Question], graded: Sequence[Sequence[GradedSample]]) -> BenchmarkResult:
    """Computes all figures of a benchmark.

    Args:
        graded: for each question, in the same order, its samples in their order; of each as many.

    Raises:
        ValueError: there are no questions, or not as many samples of each.
    """
    accuracies = _accuracies(questions, graded)
    samples = accuracies.shape[1]
    clusters = _clusters(questions)
    right_counts = (accuracies == 1.0).sum(1)
    ks = sorted({2**power for power in range(samples.bit_length())} | {samples})
    majorities = np.array([majority(of_question) for of_question in graded])
    means = accuracies.mean(1)
    return BenchmarkResult(
        samples=samples,
        average=measure(means, clusters),
        pass_at={k: measure(np.array([pass_at(k, samples, int(c)) for c in right_counts]), clusters) for k in ks},
        majority=measure(majorities, clusters),
        answered=float(np.mean([sample.vote is not None for of_question in graded for sample in of_question])),
        categories=_by_category(questions, means, clusters),
        worst_case=_worst_case(questions, accuracies),
    )


def measure(values: Floats, clusters: Sequence[str]) -> Measure:
    """Computes a mean over questions with its clustered standard error and interval.

    With x_i the values of q questions in c clusters, m their mean and s_j the sum of x_i - m over cluster j, the
    variance of the mean is c / (c - 1) * sum_j s_j^2 / q^2. Where every cluster is one question, that is s^2 / q. The
    interval has Student's t of c - 1 degrees of freedom.

    Args:
        clusters: the name of each question's cluster.
    """
    mean = float(values.mean())
    _, cluster_of = np.unique(np.array(clusters), return_inverse=True)
    sums = np.bincount(cluster_of, weights=values - mean)
    count = len(sums)
    if count == 1:
        return Measure(mean, math.inf, 0.0, 1.0, 1)
    error = math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(values)
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Measure(mean, error, max(0.0, mean - reach), min(1.0, mean + reach), count)


def pass_at(k: int, samples: int, right: int) -> float:
    """Returns the chance that one of k samples is right, when `right` of n are: 1 - C(n - c, k) / C(n, k).

    That is the unbiased estimate of arXiv 2107.03374, equation 1.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(graded: Sequence[GradedSample]) -> float:
    """Returns the accuracy of the answer that most samples give; 0 if none gives an answer.

    Of answers given as often, the one that was given first counts. A sample without an answer is no vote. Samples with
    one answer may differ in accuracy, as "A" and "A. 65" do under `mathruler`: the more frequent accuracy counts, of
    equally frequent ones the first.
    """
    accuracies: dict[str, Counter[float]] = {}
    for sample in graded:
        if sample.vote is not None:
            accuracies.setdefault(sample.vote, Counter())[sample.accuracy] += 1
    if not accuracies:
        return 0.0
    most = max(accuracies.values(), key=Counter.total)  # of equals, `max` and `most_common` take the first
    return most.most_common(1)[0][0]


def suite_average(averages: Sequence[Measure]) -> Measure:
    """Computes the mean over benchmarks, each with the same weight, as the paper does.

    Benchmarks are independent: the error is sqrt(sum of squared errors) / B, the interval that of a normal
    distribution.
    """
    mean = float(np.mean([one.mean for one in averages]))
    error = math.sqrt(sum(one.error**2 for one in averages)) / len(averages)
    reach = error * float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    low, high = max(0.0, mean - reach), min(1.0, mean + reach)
    return Measure(mean, error, low, high, sum(one.count for one in averages))


def compare(
    questions: Sequence[Question],
    ours: Sequence[Sequence[GradedSample]],
    theirs: Sequence[Sequence[GradedSample]],
) -> PairedTest:
    """Compares two models on the same questions, by their mean accuracies.

    Variants of one question are one unit of the test, with the mean of their accuracies.

    Raises:
        ValueError: there are no questions, or not as many samples of each.
    """
    clusters = _clusters(questions)
    our_means, their_means = (_means_by(clusters, _accuracies(questions, graded).mean(1)) for graded in (ours, theirs))
    return paired_test(our_means, their_means)


def _accuracies(questions: Sequence[Question], graded: Sequence[Sequence[GradedSample]]) -> Floats:
    """Returns the accuracy of each sample: float64, a row for each question."""
    counts = {len(of_question) for of_question in graded}
    if not questions or len(questions) != len(graded) or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{len(questions)} questions have {len(graded)} lists of samples, of {sorted(counts)} samples; "
            "each question needs as many"
        )
    return np.array([[sample.accuracy for sample in of_question] for of_question in graded], np.float64)


def _clusters(questions: Sequence[Question]) -> list[str]:
    """Names the cluster of each question; a question without variants is one of its own."""
    return [
        f"question {question.id}" if question.variant_of is None else f"variants of {question.variant_of}"
        for question in questions
    ]


def _means_by(clusters: Sequence[str], values: Floats) -> list[float]:
    by_cluster: dict[str, list[float]] = {}
    for cluster, value in zip(clusters, values.tolist(), strict=True):
        by_cluster.setdefault(cluster, []).append(value)
    return [float(np.mean(of_cluster)) for of_cluster in by_cluster.values()]


def _by_category(
    questions: Sequence[Question], means: Floats, clusters: Sequence[str]
) -> dict[str, dict[str, Measure]]:
    places: dict[str, dict[str, list[int]]] = {}
    for place, question in enumerate(questions):
        for name, value in question.categories.items():
            places.setdefault(name, {}).setdefault(value, []).append(place)
    return {
        name: {value: measure(means[of_value], [clusters[i] for i in of_value]) for value, of_value in values.items()}
        for name, values in places.items()
    }


def _worst_case(questions: Sequence[Question], accuracies: Floats) -> WorstCase | None:
    places: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        if question.variant_of is not None:
            places.setdefault(question.variant_of, []).append(place)
    if not places:
        return None
    names = list(places)
    averages_of_variants = np.array([accuracies[of_name].mean() for of_name in places.values()])
    worst_of_variants = np.array([accuracies[of_name].min(0).mean() for of_name in places.values()])
    return WorstCase(measure(averages_of_variants, names), measure(worst_of_variants, names))
