"""Score centering (arXiv 2609.20807): the policy gradient without its drift towards the rollout engine.

Tokens are sampled from the engine's distribution q, which differs from the trainer's p by rounding, by quantisation or
by older weights. Then the mean over q of the scores w grad log p, w being the weight of a token, is not zero. Times the
mean of the advantage at a position it is a drift, which says nothing about which token was better. Centering takes that
mean from the score of the sampled token.

Shape suffix legend: N = response tokens, flat; R = statistics per position, one for each of the engine's likeliest
tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_TAIL = 1e-6
"""The least probability of all tokens but the likeliest, by the paper's appendix A.3 as others quote it."""


def score_centering(new_logp_NR: Tensor, rollout_logp_NR: Tensor, *, cap: float | None) -> Tensor:
    """Computes the term of each position, whose gradient is the mean score; advantage times it is added to the loss.

    With the weight w(r) = min(r, cap) of a token with ratio r = p / q, or one without a cap:

        sum over the likeliest tokens of (q w(p / q) - a p) log p,    (...) without gradient

    The probabilities of the other tokens are taken to be those of p, all times the same number t, so that q adds up to
    one: t = (1 - sum q) / (1 - sum p), and a = t w(1 / t). Since the mean of grad log p over p is zero, their share
    follows from that of the likeliest.

    Args:
        new_logp_NR: [N, R] nats, with gradient; each normalised over the whole vocabulary.
        rollout_logp_NR: [N, R] nats; the same tokens by the engine, likewise.
        cap: above 0, or None.

    Returns:
        [N] in the dtype of the log-probs.
    """
    with torch.no_grad():
        p_NR, q_NR = new_logp_NR.double().exp(), rollout_logp_NR.double().exp()
        tail_N1 = (1.0 - q_NR.sum(1, keepdim=True)).clamp(min=LEAST_TAIL)
        tail_N1 = tail_N1 / (1.0 - p_NR.sum(1, keepdim=True)).clamp(min=LEAST_TAIL)
        # q w(p / q) is min(p, cap q), also where q is zero; and t w(1 / t) is min(1, cap t).
        mean_NR = q_NR if cap is None else torch.minimum(p_NR, cap * q_NR)
        scale_N1 = tail_N1 if cap is None else (cap * tail_N1).clamp(max=1.0)
        factor_NR = (mean_NR - scale_N1 * p_NR).to(new_logp_NR.dtype)
    return (factor_NR * new_logp_NR).sum(1)
