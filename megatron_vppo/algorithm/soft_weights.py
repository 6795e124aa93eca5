"""Soft weights of tokens in place of a mask: every token keeps some policy gradient.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vppo.algorithm.relative_scores import relative_in_response

_SHIFT_BOUND = 60.0
"""No shift beyond it changes a sigmoid of z-scores, which lie within the square root of the number of tokens of zero
and are clamped to half of it."""
_BISECTIONS = 60
_DEVIATION_EPS = 1e-6


def sigmoid_weights(score_BT: Tensor, mask_BT: Tensor, *, mean: float) -> Tensor:
    """Computes sigmoid(z - c) of each token, with the z-score of its score in the response, and c such that the
    response's weights have the mean that is given. The soft mask of the paper's ablation (its table 6).

    Args:
        score_BT: [B, T], finite where the mask is 1.
        mask_BT: [B, T], 1 on response tokens.
        mean: in (0, 1].

    Returns:
        [B, T] float32; 0.0 where padded.
    """
    if mean >= 1.0:
        return mask_BT.float()
    mask_BT = mask_BT.double()
    z_BT = _z_scores(score_BT.double(), mask_BT).clamp(-_SHIFT_BOUND / 2, _SHIFT_BOUND / 2)
    count_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    low_B1 = torch.full_like(count_B1, -_SHIFT_BOUND)
    high_B1 = -low_B1
    for _ in range(_BISECTIONS):
        shift_B1 = (low_B1 + high_B1) / 2
        mean_B1 = (torch.sigmoid(z_BT - shift_B1) * mask_BT).sum(1, keepdim=True) / count_B1
        low_B1 = torch.where(mean_B1 > mean, shift_B1, low_B1)
        high_B1 = torch.where(mean_B1 > mean, high_B1, shift_B1)
    return (torch.sigmoid(z_BT - low_B1) * mask_BT).float()


def pgpo_weights(score_BT: Tensor, mask_BT: Tensor, *, tau: float, beta: float) -> Tensor:
    """Computes PGPO's weights (arXiv 2604.01840) from the relative score v of each token in its response, 0 to 1:

        w = v / tau                                  below tau
        w = 1 + beta (v - tau) / (1 - tau)           from tau on

    divided by their mean over the response, so that their sum is the number of its tokens. A response whose scores are
    all equal has the weights one.

    Args:
        score_BT, mask_BT: see sigmoid_weights.
        tau: in (0, 1).
        beta: at least 0.

    Returns:
        [B, T] float32; 0.0 where padded.
    """
    valid_BT, mask_BT, relative_BT = mask_BT.bool(), mask_BT.double(), relative_in_response(score_BT, mask_BT)
    rising_BT = 1.0 + beta * (relative_BT - tau) / (1.0 - tau)
    weight_BT = torch.where(relative_BT < tau, relative_BT / tau, rising_BT)
    some_differ_B1 = relative_BT.amax(1, keepdim=True) > 0
    weight_BT = torch.where(valid_BT & some_differ_B1, weight_BT, mask_BT)
    mean_B1 = weight_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return (weight_BT / torch.where(mean_B1 > 0, mean_B1, 1.0)).float()


def _z_scores(score_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns scores less the mean of their response, over its deviation (of all its tokens, biased)."""
    count_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    score_BT = torch.where(mask_BT.bool(), score_BT, 0.0)
    centred_BT = (score_BT - score_BT.sum(1, keepdim=True) / count_B1) * mask_BT
    deviation_B1 = ((centred_BT**2).sum(1, keepdim=True) / count_B1).sqrt()
    return centred_BT / (deviation_B1 + _DEVIATION_EPS)
