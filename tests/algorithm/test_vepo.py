"""VEPO's score, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.vepo import vepo_scores

MASK = torch.tensor([[1.0, 1, 1, 1, 0]])
DIVERGENCE = torch.tensor([[0.0, 0.2, 0.4, 0.1, 9.0]])
ENTROPY = torch.tensor([[3.0, 2.0, 1.0, 2.5, 9.0]])
PERTURBED = torch.tensor([[3.0, 1.0, 3.0, 3.0, 9.0]])


def test_by_hand() -> None:
    """j = 0, 1/2, 1, 1/4; g = |0, -1, 2, 1/2| / 2 = 0, 1/2, 1, 1/4; h = 1, 1/2, 0, 3/4. The entropy falls without the
    image at the second token, which counts like a rise.
    """
    score_BT = vepo_scores(DIVERGENCE, ENTROPY, PERTURBED, MASK, alpha=0.7)
    assert score_BT[0].tolist() == pytest.approx([0.0, 0.25, 0.0, 0.1875, 0.0], abs=1e-6)


def test_alpha_weighs_the_divergence() -> None:
    """g is 0, 1/2, 0, 1 of another view: (1 - (1/2)^0.7 1^0.3) / 2 and (1 - (3/4)^0.7 0^0.3) 3/4 for the last."""
    perturbed = torch.tensor([[3.0, 3.0, 1.0, 4.5, 0.0]])
    score_BT = vepo_scores(DIVERGENCE, ENTROPY, perturbed, MASK, alpha=0.7)
    assert score_BT[0].tolist() == pytest.approx([0.0, (1 - 0.5**0.7 * 0.5**0.3) / 2, 0.0, 0.75, 0.0], abs=1e-6)
    only_divergence = vepo_scores(DIVERGENCE, ENTROPY, perturbed, MASK, alpha=1.0)
    assert only_divergence[0].tolist() == pytest.approx([0.0, 0.25, 0.0, 0.1875, 0.0], abs=1e-6)
    only_entropies = vepo_scores(DIVERGENCE, ENTROPY, perturbed, MASK, alpha=0.0)
    assert only_entropies[0].tolist() == pytest.approx([0.0, 0.25, 0.0, 0.75, 0.0], abs=1e-6)
