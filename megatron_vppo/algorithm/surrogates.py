"""Surrogate losses of the policy, one per method. Each is a loss per token that the policy gradient follows.

r = p_new / p_old is the ratio of a token, A its advantage. At r = 1 all of them have the gradient -A grad log p_new.

Shape suffix legend: N = response tokens of any number of responses, flat, without padding; B = these responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_CLAMP = 20.0
"""Nats; it keeps exp() of a runaway token finite."""
NO_DUAL_BOUND = 1e30
"""A dual bound that no ratio reaches."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    loss_N: Tensor
    """The loss of each token, with gradient."""
    clipped_high_N: Tensor
    """bool; True if the ratio left the clip range in the direction that the advantage asks for: above it for a positive
    advantage, below it for a negative one. All False for a loss without a range."""
    clipped_dual_N: Tensor
    """bool; True if the advantage is negative and the ratio exceeds the dual bound."""


def dual_clip_surrogate(
    new_logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
) -> Surrogate:
    """Computes PPO's pessimistic surrogate, clipped in log space, with a second bound for negative advantages.

    With the ratio r = p_new / p_old and the advantage A, the loss of a token is:

        r lies     below 1 - low    in between    above 1 + high    above dual
        A > 0      -A r             -A r          -A (1 + high)     -A (1 + high)
        A < 0      -A (1 - low)     -A r          -A r              -A dual

    So a token has no gradient once the policy has moved far enough in the advantage's direction. The dual bound keeps a
    token of negative advantage, which the new policy likes far more than the old one, from dominating the loss. It is
    in the authors' code, not in the paper.

    Args:
        new_logp_N: [N] fp32 nats, with gradient.
        old_logp_N, advantage_N: [N] fp32; nats, and shaped advantages.
        clip_ratio_low, clip_ratio_high: the bounds' distances from ratio one.
        clip_ratio_dual: the largest ratio that a negative advantage pays for.
    """
    log_ratio_N = new_logp_N - old_logp_N
    ratio_N = log_ratio_N.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    clipped_N = log_ratio_N.clamp(math.log(1.0 - clip_ratio_low), math.log(1.0 + clip_ratio_high)).exp()
    free_N, bounded_N, dual_N = -advantage_N * ratio_N, -advantage_N * clipped_N, -advantage_N * clip_ratio_dual
    # torch.maximum and minimum, as in the authors' code: on an exact tie each side gets half of the gradient.
    pessimistic_N = torch.maximum(free_N, bounded_N)
    negative_N = advantage_N < 0
    return Surrogate(
        loss_N=torch.where(negative_N, torch.minimum(pessimistic_N, dual_N), pessimistic_N),
        clipped_high_N=free_N < bounded_N,
        clipped_dual_N=negative_N & (pessimistic_N > dual_N),
    )


def gspo_surrogate(
    new_logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    length_B: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> Surrogate:
    """Computes GSPO's surrogate (arXiv 2507.18071, in its form per token, Eq. 14): one ratio for a whole response.

    s = exp(mean of log r over the response) takes the place of r in PPO's clipped surrogate. Each token has the value
    of s and the gradient of its own log-prob, s A grad log p_new. With one advantage for a response that sums up to
    GSPO's gradient. The paper clips at 3e-4 below and 4e-4 above.

    Args:
        new_logp_N, old_logp_N, advantage_N: see dual_clip_surrogate; the tokens of a response lie together.
        length_B: int64 [B]; the number of tokens of each response, whole ones.
    """
    log_ratio_N = (new_logp_N - old_logp_N).detach()
    mean_B = torch.segment_reduce(log_ratio_N, "mean", lengths=length_B, unsafe=True)
    mean_N = mean_B.repeat_interleave(length_B, output_size=len(log_ratio_N))
    log_ratio_N = mean_N + new_logp_N - new_logp_N.detach()
    return dual_clip_surrogate(
        log_ratio_N,
        torch.zeros_like(log_ratio_N),
        advantage_N,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        clip_ratio_dual=NO_DUAL_BOUND,
    )


def cispo_surrogate(
    new_logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, clip_ratio_low: float, clip_ratio_high: float
) -> Surrogate:
    """Computes CISPO's surrogate (arXiv 2506.13585, Eq. 4): -A log p_new, weighted by the clipped ratio.

    The weight carries no gradient, so every token keeps one, however far its ratio is.

    Args:
        new_logp_N, old_logp_N, advantage_N: see dual_clip_surrogate.
        clip_ratio_low, clip_ratio_high: the bounds' distances from ratio one. The paper has no lower bound.
    """
    ratio_N = _ratio(new_logp_N.detach(), old_logp_N)
    weight_N = ratio_N.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    outside_N = torch.where(advantage_N < 0, ratio_N < weight_N, ratio_N > weight_N)
    return Surrogate(
        loss_N=-advantage_N * weight_N * new_logp_N,
        clipped_high_N=outside_N & (advantage_N != 0),
        clipped_dual_N=torch.zeros_like(outside_N),
    )


def sapo_surrogate(
    new_logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, tau_positive: float, tau_negative: float
) -> Surrogate:
    """Computes SAPO's surrogate (arXiv 2511.20347): -A 4 / tau sigmoid(tau (r - 1)), a soft gate instead of a clip.

    Its gradient is that of -A r at r = 1 and fades on either side, the faster the larger tau.

    Args:
        new_logp_N, old_logp_N, advantage_N: see dual_clip_surrogate.
        tau_positive, tau_negative: tau where A > 0, and elsewhere. The paper has 1.0 and 1.05.
    """
    ratio_N = _ratio(new_logp_N, old_logp_N)
    tau_N = torch.where(advantage_N > 0, tau_positive, tau_negative)
    none_N = torch.zeros_like(advantage_N, dtype=torch.bool)
    return Surrogate(
        loss_N=-advantage_N * 4.0 / tau_N * torch.sigmoid(tau_N * (ratio_N - 1.0)),
        clipped_high_N=none_N,
        clipped_dual_N=none_N,
    )


def reinforce_surrogate(new_logp_N: Tensor, advantage_N: Tensor) -> Surrogate:
    """Computes REINFORCE's surrogate, -A log p_new: no ratio, and nothing is clipped.

    Args:
        new_logp_N, advantage_N: see dual_clip_surrogate.
    """
    none_N = torch.zeros_like(advantage_N, dtype=torch.bool)
    return Surrogate(loss_N=-advantage_N * new_logp_N, clipped_high_N=none_N, clipped_dual_N=none_N)


def _ratio(new_logp_N: Tensor, old_logp_N: Tensor) -> Tensor:
    return (new_logp_N - old_logp_N).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
