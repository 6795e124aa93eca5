"""VEPO's score of a token (arXiv 2606.03937): how much the image changes its distribution, times how open that is.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

from torch import Tensor

from megatron_vppo.algorithm.relative_scores import relative_in_response


def vepo_scores(
    divergence_BT: Tensor, entropy_BT: Tensor, perturbed_entropy_BT: Tensor, mask_BT: Tensor, *, alpha: float
) -> Tensor:
    """Computes (1 - (1 - j)^alpha (1 - g)^(1 - alpha)) h, with three numbers of each token, from 0 for the smallest of
    its response to 1 for the largest: j its divergence, g the distance of its two entropies, h its entropy.

    Args:
        divergence_BT: [B, T] nats; between the two views. The paper's is the Jensen-Shannon divergence.
        entropy_BT, perturbed_entropy_BT: [B, T] nats; given the original and the perturbed image.
        mask_BT: [B, T], 1 on response tokens.
        alpha: the weight of the divergence against the distance of the entropies, in [0, 1].

    Returns:
        [B, T] float32 in [0, 1]; 0.0 where padded.
    """
    j_BT = relative_in_response(divergence_BT, mask_BT)
    g_BT = relative_in_response((perturbed_entropy_BT - entropy_BT).abs(), mask_BT)
    h_BT = relative_in_response(entropy_BT, mask_BT)
    return ((1.0 - (1.0 - j_BT) ** alpha * (1.0 - g_BT) ** (1.0 - alpha)) * h_BT).float()
