"""The clipped surrogate and the entropy term of the update; docs/algorithm.md, "Loss".

Shape suffix legend: N = response tokens of any number of responses, flat, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import LossSpec, TokenTerms

LOG_RATIO_CLAMP = 20.0
"""Nats; it keeps exp() of a runaway token finite."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    loss_N: Tensor
    """The loss of each token, with gradient."""
    clipped_high_N: Tensor
    """bool; True if the ratio left the clip range in the direction that the advantage asks for: above it for a positive
    advantage, below it for a negative one."""
    clipped_dual_N: Tensor
    """bool; True if the advantage is negative and the ratio exceeds the dual bound."""


@dataclass(frozen=True, slots=True)
class LossSums:
    """The loss of some tokens of a mini-batch. Everything in it adds up over any split of the mini-batch."""

    loss: Tensor
    """A scalar with gradient."""
    weighted_sums: Mapping[str, Tensor]
    """Detached scalars by metric; their sums over the mini-batch are final."""
    token_sums: Mapping[str, Tensor]
    """Detached scalars by metric; divide their sums over the mini-batch by its number of response tokens."""


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


def surrogate_loss(
    new_logp_N: Tensor, terms: TokenTerms, *, spec: LossSpec, entropy_N: Tensor | None = None
) -> LossSums:
    """Computes the loss of a micro-batch's tokens: sum(pg_weight * surrogate) + sum(entropy_weight * entropy term).

    The weights hold masks, denominators and coefficients (see token_weights.py), so the losses of the micro-batches add
    up to the loss of the mini-batch, and so do their gradients.

    Args:
        new_logp_N: [N] fp32 nats, with gradient.
        terms: the mini-batch at these tokens.
        entropy_N: [N] nats; the entropy of the full distribution, with gradient. entropy_kind 'entropy' needs it;
            otherwise it is only reported.
    """
    surrogate = dual_clip_surrogate(
        new_logp_N,
        terms.old_logp_N,
        terms.advantage_N,
        clip_ratio_low=spec.clip_ratio_low,
        clip_ratio_high=spec.clip_ratio_high,
        clip_ratio_dual=spec.clip_ratio_dual,
    )
    pg_loss = (terms.pg_weight_N * surrogate.loss_N).sum()
    penalty = (terms.entropy_weight_N * _entropy_term(new_logp_N, entropy_N, kind=spec.entropy_kind)).sum()
    token_sums = {
        "actor/ppo_kl": (terms.old_logp_N - new_logp_N).detach().sum(),
        "actor/entropy_loss": -new_logp_N.detach().sum(),
        "actor/pg_clipfrac_higher": surrogate.clipped_high_N.sum().to(torch.float32),
        "actor/pg_clipfrac_lower": surrogate.clipped_dual_N.sum().to(torch.float32),
    }
    if entropy_N is not None:
        token_sums["actor/entropy"] = entropy_N.detach().sum()
    loss = pg_loss + penalty
    weighted_sums = {
        "actor/pg_loss": pg_loss.detach(),
        "actor/entropy_penalty": penalty.detach(),
        "actor/loss": loss.detach(),
    }
    return LossSums(loss=loss, weighted_sums=weighted_sums, token_sums=token_sums)


def _entropy_term(new_logp_N: Tensor, entropy_N: Tensor | None, *, kind: str) -> Tensor:
    """Returns what the penalty lowers: -log pi of the sampled token (the authors'), or the full entropy."""
    if kind == "nll":
        return -new_logp_N
    if kind != "entropy":
        raise ValueError(f"entropy_kind is {kind!r}; set it to 'nll' or 'entropy'")
    if entropy_N is None:
        raise ValueError("entropy_kind 'entropy' needs entropy_N with gradient; ask the vocabulary head for it")
    return entropy_N
