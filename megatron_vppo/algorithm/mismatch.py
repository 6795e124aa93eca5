"""The distance of the rollout engine's log-probs from the trainer's, for the same tokens and weights.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens, flat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vppo.algorithm.padding import length_mask, pad_rows
from megatron_vppo.algorithm.types import Response, Scores


def rollout_mismatch(responses: Sequence[Response], scores: Scores, *, bound: float) -> dict[str, float]:
    """Measures |log p_trainer - log p_rollout| in nats per token: mean, largest, and the share of tokens over `bound`.

    The numbers are near zero with top_p = 1 and top_k off. Truncated sampling renormalises, which shows here. Tokens
    that older weights sampled are left out; if there are no others, so are the numbers.
    `token_mult_prob_error` is NeMo-RL's, the mean of exp of the same differences: one where the two agree.
    """
    width = scores.old_logp_BT.shape[1]
    rollout_logp_BT = pad_rows([r.rollout_logps for r in responses], dtype=torch.float32, width=width)
    mask_BT = length_mask([len(r.token_ids) for r in responses], width=width).bool()
    carried_BT = length_mask([r.carried_tokens for r in responses], width=width).bool()
    difference_N = (scores.old_logp_BT - rollout_logp_BT).abs()[mask_BT & ~carried_BT]
    entropy = {"actor/entropy": scores.entropy_BT[mask_BT].mean().item()}
    if len(difference_N) == 0:
        return entropy
    return {
        "training/rollout_logp_diff_mean": difference_N.mean().item(),
        "training/rollout_logp_diff_max": difference_N.max().item(),
        "training/rollout_logp_diff_frac_over": (difference_N > bound).float().mean().item(),
        # In float64: e^89 is infinite in float32, and one token that the engine found impossible may differ by more.
        "training/token_mult_prob_error": difference_N.double().exp().mean().item(),
        **entropy,
    }
