"""Per-token weights of the two loss terms: masks, denominators, coefficient and rollout correction.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vppo.config.choices import CorrectionKind, CountedTokens, LossAverage

MOST_LOG_RATIO = 20.0
"""Nats; it keeps exp() finite."""


def policy_gradient_weight(
    token_mask_BT: Tensor,
    trained_mask_BT: Tensor,
    *,
    denominator: CountedTokens,
    average: LossAverage,
    fixed_length: int = 1,
) -> Tensor:
    """Returns the weight of each token's surrogate loss. The weighted sum over all ranks is the mini-batch's loss.

    Args:
        token_mask_BT: [B, T], 1 on the tokens that the filter keeps, or other weights.
        trained_mask_BT: [B, T], 1 on all response tokens of responses that are trained on.
        denominator: 'all': divide by the number of tokens of trained_mask_BT (the authors' code). If 40 % of them are
            kept, the gradient is 0.4 times that of a mean over the kept ones. 'selected': divide by the number kept.
        average: 'token': one mean over the tokens of the mini-batch (the authors' code). 'seq': a mean per response,
            then a mean over the responses that have tokens to count (paper Eq. 6). 'fixed_length': a sum per response
            over `fixed_length`, then the same mean (Dr. GRPO, arXiv 2503.20783); `denominator` has no effect.

    Returns:
        [B, T] float32; 0.0 where no policy gradient flows.
    """
    kept_BT = token_mask_BT.double() * trained_mask_BT.double()
    if denominator not in ("all", "selected"):
        raise ValueError(f"loss_denominator is {denominator!r}; set it to 'all' or 'selected'")
    counted_BT = trained_mask_BT.double() if denominator == "all" else kept_BT
    if average == "token":
        return (kept_BT / counted_BT.sum().clamp(min=1)).float()
    num_responses = (counted_BT.sum(1) > 0).sum().clamp(min=1)
    if average == "fixed_length":
        return (kept_BT / fixed_length / num_responses).float()
    if average != "seq":
        raise ValueError(f"loss_avg_mode is {average!r}; set it to 'token', 'seq' or 'fixed_length'")
    return (kept_BT / counted_BT.sum(1, keepdim=True).clamp(min=1) / num_responses).float()


def entropy_penalty_weight(
    token_mask_BT: Tensor, trained_mask_BT: Tensor, *, coefficient: float, tokens: CountedTokens
) -> Tensor:
    """Returns the weight of each token's entropy term: the coefficient, divided by the number of covered tokens.

    Args:
        token_mask_BT, trained_mask_BT: as in policy_gradient_weight.
        tokens: 'all': cover all trained response tokens (the authors' code). 'selected': cover those that carry policy
            gradient.

    Returns:
        [B, T] float32, never negative. The loss adds the entropy term with this weight, so training lowers it.
    """
    if tokens not in ("all", "selected"):
        raise ValueError(f"entropy_tokens is {tokens!r}; set it to 'all' or 'selected'")
    covered_BT = trained_mask_BT.double() * (1.0 if tokens == "all" else token_mask_BT.double())
    return (coefficient * covered_BT / covered_BT.sum().clamp(min=1)).float()


def rollout_correction(
    old_logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor, *, cap: float, kind: CorrectionKind
) -> Tensor:
    """Returns the importance weights of sampled tokens, from the ratios r = p_trainer / p_rollout.

        token            min(r, cap)
        sequence_mask    the product of r over the response, for each of its tokens; 0 if it is above the cap
        geometric_mask   1; 0 for the tokens of a response whose geometric mean of r is above the cap or below 1 / cap

    Args:
        old_logp_BT: [B, T] nats; the trainer's log-probs, with the model weights before the step's updates.
        rollout_logp_BT: [B, T] nats; the engine's log-probs, in the distribution it sampled from: after temperature,
            top-p and banned tokens, and with older weights where a response was carried (rollout.unfinished).
        mask_BT: [B, T], 1 on response tokens.

    Returns:
        [B, T] float32; 0.0 where padded.
    """
    if not cap > 0:
        raise ValueError(f"rollout_correction_cap is {cap}; set it above 0, or to null for no correction")
    log_ratio_BT = torch.where(mask_BT.bool(), old_logp_BT - rollout_logp_BT, 0.0)
    if kind == "token":
        weight_BT = log_ratio_BT.clamp(max=MOST_LOG_RATIO).exp().clamp(max=cap)
    elif kind == "sequence_mask":
        total_B1 = log_ratio_BT.double().sum(1, keepdim=True)
        weight_BT = torch.where(total_B1 > math.log(cap), 0.0, total_B1.exp()).expand_as(log_ratio_BT)
    elif kind == "geometric_mask":
        mean_B1 = log_ratio_BT.double().sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        weight_BT = (mean_B1.abs() <= abs(math.log(cap))).expand_as(log_ratio_BT)
    else:
        raise ValueError(f"rollout_correction is {kind!r}; set it to 'token', 'sequence_mask' or 'geometric_mask'")
    return (weight_BT * mask_BT.bool()).float()
