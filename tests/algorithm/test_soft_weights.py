"""Soft weights of tokens, against numbers worked out by hand and against scipy-free float64 sums."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vppo.algorithm.soft_weights import pgpo_weights, sigmoid_weights

SCORES = torch.tensor([[0.0, 1.0, 2.0, 9.0], [5.0, 5.0, 5.0, 5.0], [3.0, 0.0, 0.0, 0.0]])
MASK = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def test_pgpo_by_hand() -> None:
    """Relative scores 0, 0.5 and 1: weights 0, 1 + 2 (0.1) / 0.6 and 3, over their mean 13/9."""
    middle = 1 + 2 * 0.1 / 0.6
    mean = (0 + middle + 3) / 3
    weight_BT = pgpo_weights(SCORES, MASK, tau=0.4, beta=2.0)
    assert weight_BT[0].tolist() == pytest.approx([0.0, middle / mean, 3 / mean, 0.0])
    assert weight_BT[1].tolist() == [1.0] * 4, "no score says anything"
    assert weight_BT[2].tolist() == [1.0, 0, 0, 0]
    below = pgpo_weights(torch.tensor([[0.0, 0.3, 1.0]]), torch.ones(1, 3), tau=0.6, beta=0.0)
    assert below.tolist()[0] == pytest.approx([0.0, 0.5 * 2, 1.0 * 2])
    assert pgpo_weights(SCORES, MASK, tau=0.4, beta=2.0).sum(1).tolist() == pytest.approx(MASK.sum(1).tolist())


@pytest.mark.parametrize("mean", [0.05, 0.4, 0.9])
def test_sigmoid_weights_have_the_mean_and_are_sigmoids_of_z_scores(mean: float) -> None:
    weight_BT = sigmoid_weights(SCORES, MASK, mean=mean).double()
    assert (weight_BT.sum(1) / MASK.sum(1)).tolist() == pytest.approx([mean] * 3, rel=1e-6)
    logits = [math.log(w / (1 - w)) for w in weight_BT[0, :3].tolist()]
    # z-scores of 0, 1, 2: the deviation is sqrt(2/3).
    assert logits[1] - logits[0] == pytest.approx(math.sqrt(1.5), rel=1e-4)
    assert logits[2] - logits[1] == pytest.approx(math.sqrt(1.5), rel=1e-4)
    assert weight_BT[1].tolist() == pytest.approx([mean] * 4)
    assert weight_BT[0, 3] == 0.0 and weight_BT[2, 1:].tolist() == [0.0] * 3


def test_a_share_of_one_keeps_everything() -> None:
    assert torch.equal(sigmoid_weights(SCORES, MASK, mean=1.0), MASK)


def test_one_outlier_among_many_does_not_overflow() -> None:
    score_BT = torch.zeros(1, 8192)
    score_BT[0, 5] = 1e30
    weight_BT = sigmoid_weights(score_BT, torch.ones(1, 8192), mean=0.4)
    assert weight_BT.isfinite().all() and weight_BT.mean().item() == pytest.approx(0.4, rel=1e-5)
