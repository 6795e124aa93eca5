"""Comparison of two scorings, against scipy and loops over Python lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from scipy import stats

from megatron_vppo.algorithm.types import Scores
from megatron_vppo.fidelity.compare import average_ranks, compare, decide, spearman, spread
from tests.algorithm.rows import response, settings

LENGTHS = (7, 4, 5, 1)
WIDTH = 8
KEPT = (3, 2, 2, 1)
"""ceil(0.4 x length)."""
EXACT = 1e-12
FLOAT32 = 1e-6


def make_scores(seed: int, *, kind: str = "k3_sampled") -> Scores:
    generator = torch.Generator().manual_seed(seed)
    logp_BT, perturbed_BT, divergence_BT = (torch.rand(4, WIDTH, generator=generator) * 2 - 3 for _ in range(3))
    return Scores(
        old_logp_BT=logp_BT,
        entropy_BT=torch.zeros(4, WIDTH),
        perturbed_logp_BT=perturbed_BT,
        divergence_BT=divergence_BT.abs() if kind != "k3_sampled" else None,
    )


def dependency(scores: Scores, kind: str) -> list[list[float]]:
    """Per response, without padding."""
    rows = []
    for row, length in enumerate(LENGTHS):
        if scores.divergence_BT is not None:
            rows.append(scores.divergence_BT[row, :length].tolist())
            continue
        x = [float(scores.perturbed_logp_BT[row, t] - scores.old_logp_BT[row, t]) for t in range(length)]  # type: ignore[index]
        rows.append([math.exp(v) - 1 - v for v in x])
    return rows


def kept(rows: Sequence[Sequence[float]]) -> list[set[int]]:
    return [
        set(sorted(range(len(row)), key=lambda t, row=row: (-row[t], t))[:count])  # type: ignore[misc]
        for row, count in zip(rows, KEPT, strict=True)
    ]


def scales(rows: Sequence[Sequence[float]], *, low: float) -> list[float]:
    scores = [sum(row) / len(row) for row in rows]
    relative = [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]
    high = low + (1 - low) / (sum(relative) / len(relative))
    return [low + value * (high - low) for value in relative]


@pytest.mark.parametrize("kind", ["k3_sampled", "kl_full", "jsd"])
@pytest.mark.parametrize("filtering", [True, False], ids=["as set", "switched on"])
def test_differences_by_hand(kind: str, filtering: bool) -> None:
    before, after = make_scores(1, kind=kind), make_scores(2, kind=kind)
    responses = [response(length, group=n // 2, sample=n % 2) for n, length in enumerate(LENGTHS)]
    options = settings(dependency=kind, use_vppo_on_perception=filtering, use_advantage_shaping=filtering)
    one, other = (
        decide(responses, scores, settings=options, responses_per_minibatch=4, micro_batch_size=2)
        for scores in (before, after)
    )
    found = compare(one, other, responses)

    left, right = dependency(before, kind), dependency(after, kind)
    flat_left, flat_right = ([value for row in rows for value in row] for rows in (left, right))
    shift = [b - a for a, b in zip(flat_left, flat_right, strict=True)]
    assert found.dependency_N.tolist() == pytest.approx(shift, abs=FLOAT32)
    assert found.spearman == pytest.approx(stats.spearmanr(flat_left, flat_right).statistic, abs=EXACT)
    each = [stats.spearmanr(a, b).statistic for a, b in zip(left[:3], right[:3], strict=True)]
    assert found.spearman_B[:3].tolist() == pytest.approx(each, abs=EXACT)
    assert math.isnan(found.spearman_B[3]), "one token has no order"

    shared = [a & b for a, b in zip(kept(left), kept(right), strict=True)]
    assert found.overlap == pytest.approx(sum(map(len, shared)) / sum(KEPT), abs=FLOAT32)
    assert found.overlap_B.tolist() == pytest.approx([len(s) / n for s, n in zip(shared, KEPT, strict=True)])
    every = [(row[t], t in again) for row, mine, again in zip(left, kept(left), shared, strict=True) for t in mine]
    lost = sum(value for value, again in every if not again) / sum(value for value, _ in every)
    assert found.lost_dependency == pytest.approx(lost, abs=FLOAT32) and lost > 0.1

    moved = [b - a for a, b in zip(scales(left, low=0.9), scales(right, low=0.9), strict=True)]
    assert found.scale_B.tolist() == pytest.approx(moved, abs=FLOAT32)
    means = [sum(b) / len(b) - sum(a) / len(a) for a, b in zip(left, right, strict=True)]
    assert found.dependency_mean_B.tolist() == pytest.approx(means, abs=FLOAT32)

    at = [(row, t) for row, length in enumerate(LENGTHS) for t in range(length)]
    logps = [abs(float(after.old_logp_BT[place] - before.old_logp_BT[place])) for place in at]
    perturbed = [abs(float(after.perturbed_logp_BT[place] - before.perturbed_logp_BT[place])) for place in at]  # type: ignore[index]
    assert found.logp_N.tolist() == pytest.approx(logps, abs=FLOAT32)
    assert found.perturbed_logp_N.tolist() == pytest.approx(perturbed, abs=FLOAT32)


def test_equal_scores_differ_in_nothing() -> None:
    responses = [response(length, group=n // 2, sample=n % 2) for n, length in enumerate(LENGTHS)]
    same = decide(
        responses, make_scores(3), settings=settings(), responses_per_minibatch=2, micro_batch_size=2
    )  # two mini-batches: a scale each
    found = compare(same, same, responses)
    assert found.overlap == 1.0 and found.lost_dependency == 0.0
    assert found.spearman == pytest.approx(1.0, abs=EXACT)
    for values in (found.logp_N, found.perturbed_logp_N, found.dependency_N, found.scale_B, found.dependency_mean_B):
        assert values.abs().max() == 0


def test_ranks_with_ties_as_scipy_has_them() -> None:
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randint(0, 6, (50,), generator=generator).float() for _ in range(2))
    assert average_ranks(left).tolist() == stats.rankdata(left.numpy()).tolist()
    assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=EXACT)
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert spearman(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([9.0, 4.0, 1.0])) == pytest.approx(-1.0, abs=EXACT)
    assert math.isnan(spearman(left, torch.ones(50)))


def test_spread_takes_values_that_occur() -> None:
    values = torch.tensor([-4.0, 1.0, 2.0, 3.0])
    found = spread(values)
    assert (found.mean, found.p50, found.p99, found.largest) == (2.5, 2.0, 4.0, 4.0)
    hundred = spread(torch.arange(1, 201).float())
    assert (hundred.p50, hundred.p99, hundred.largest) == (100.0, 198.0, 200.0)
