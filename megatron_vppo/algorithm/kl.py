"""The divergence of the policy from a reference model, estimated on sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vppo.config.choices import KlKind

LOG_RATIO_CLAMP = 20.0
"""Nats; it keeps exp() of a runaway token finite."""
K3_BOUND = 10.0
"""Nats; the most that k3 counts of a token, as in verl and EasyR1."""


def kl_estimate(logp: Tensor, reference_logp: Tensor, *, kind: KlKind) -> Tensor:
    """Estimates KL(policy || reference) of each token from its log-probs, in any shape; nats.

    With d = log p_policy - log p_reference (Schulman, "Approximating KL Divergence"):

        k1    d                          unbiased; of either sign; as a loss its gradient is zero in expectation
        abs   |d|
        k2    d^2 / 2                    as a loss it has the gradient of the divergence
        k3    exp(-d) - 1 + d            unbiased and never negative; GRPO's
    """
    difference = (logp - reference_logp).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        return (torch.expm1(-difference) + difference).clamp(max=K3_BOUND)
    raise ValueError(f"kl_kind is {kind!r}; set it to 'k1', 'abs', 'k2' or 'k3'")
