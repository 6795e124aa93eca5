"""The dependency of a token on the image: the divergence between the policy with and without it (paper Eq. 3).

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens of any number of responses,
flat; V = vocabulary rows, all of them or one slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_2 = 0.6931471805599453
SMALL_LOG_RATIO = 1.0
"""Below this |log ratio|, exp(x) - 1 - x is formed with expm1; above it, the plain difference loses nothing."""


def k3_sampled(
    old_logp_BT: Tensor,
    perturbed_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    expm1: bool,
    x_clamp: float = 20.0,
    maximum: float = 10.0,
) -> Tensor:
    """Computes the authors' estimator of KL(original view || perturbed view) from the sampled token alone.

    With x the clamped log-prob difference (perturbed minus original): exp(x) - 1 - x, limited to [0, maximum].

    Args:
        old_logp_BT, perturbed_logp_BT: [B, T] nats; the sampled tokens' log-probs in the two views.
        mask_BT: [B, T], 1 on response tokens.
        expm1: use expm1(x) - x. The authors' exp(x) - x - 1 cancels in fp32: 93 % of inputs with |x| <= 3e-4 give zero.
        x_clamp: bound on |x|, nats.
        maximum: bound on the result, nats.

    Returns:
        [B, T] nats in the dtype of the inputs; 0.0 where padded.
    """
    x_BT = (perturbed_logp_BT - old_logp_BT).clamp(-x_clamp, x_clamp)
    k3_BT = torch.expm1(x_BT) - x_BT if expm1 else x_BT.exp() - x_BT - 1
    # torch.where, not a product: NaN in the padding must not reach the result.
    return torch.where(mask_BT.bool(), k3_BT.clamp(0.0, maximum), torch.zeros_like(k3_BT))


def kl_full(logp_NV: Tensor, perturbed_logp_NV: Tensor) -> Tensor:
    """Computes KL(original || perturbed) over the vocabulary: the quantity that the paper defines (Eq. 3).

    Args:
        logp_NV, perturbed_logp_NV: [N, V] finite log-probs, each normalised over the *whole* vocabulary. V may be a
            slice of the vocabulary: the results of all slices add up to the divergence.

    Returns:
        [N] nats, never negative.
    """
    return _kl_by_positive_terms(logp_NV, perturbed_logp_NV)


def jsd(logp_NV: Tensor, perturbed_logp_NV: Tensor) -> Tensor:
    """Computes the Jensen-Shannon divergence between the two views: symmetric, at most log 2.

    It takes arguments as kl_full does.
    """
    mixture_NV = torch.logaddexp(logp_NV, perturbed_logp_NV) - LOG_2
    return 0.5 * (_kl_by_positive_terms(logp_NV, mixture_NV) + _kl_by_positive_terms(perturbed_logp_NV, mixture_NV))


def _kl_by_positive_terms(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """Computes KL(p || q) as sum_V p (q/p - 1 - log(q/p)): the added q - p sums to zero over the vocabulary.

    No term is negative, so near-equal distributions do not cancel. An error e in either normaliser enters as e**2; the
    plain sum of p log(p/q) would carry e itself.
    """
    x_NV = logq_NV - logp_NV
    p_NV = logp_NV.exp()
    near_NV = p_NV * (torch.expm1(x_NV.clamp(-SMALL_LOG_RATIO, SMALL_LOG_RATIO)) - x_NV)
    far_NV = logq_NV.exp() - p_NV - p_NV * x_NV
    return torch.where(x_NV.abs() < SMALL_LOG_RATIO, near_NV, far_NV).sum(-1)
