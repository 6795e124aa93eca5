"""Estimators of the divergence from a reference model, against the divergence itself, by enumeration in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vppo.algorithm.kl import kl_estimate
from megatron_vppo.config.choices import KlKind

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.0, 0.5, 1.0, -2.0], dtype=torch.float64).log_softmax(0)


def divergence(logp: torch.Tensor) -> torch.Tensor:
    return (logp.exp() * (logp - REFERENCE)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimates_are_unbiased(kind: KlKind) -> None:
    logp = LOGITS.log_softmax(0)
    mean = (logp.exp() * kl_estimate(logp, REFERENCE, kind=kind)).sum()
    assert mean.item() == pytest.approx(divergence(logp).item(), rel=1e-12)


def test_k2_has_the_gradient_of_the_divergence_and_k1_has_none() -> None:
    """Tokens are drawn from the policy, through which no gradient flows."""

    def gradient(kind: KlKind | None) -> torch.Tensor:
        logits = LOGITS.clone().requires_grad_()
        logp = logits.log_softmax(0)
        drawn = logp.detach().exp()
        loss = divergence(logp) if kind is None else (drawn * kl_estimate(logp, REFERENCE, kind=kind)).sum()
        loss.backward()
        assert logits.grad is not None
        return logits.grad

    torch.testing.assert_close(gradient("k2"), gradient(None), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient("k1"), torch.zeros_like(LOGITS), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("kind", "up", "down"),
    [("k1", 2.0, -2.0), ("abs", 2.0, 2.0), ("k2", 2.0, 2.0), ("k3", math.exp(-2) + 1, math.exp(2) - 3)],
)
def test_values_by_hand(kind: KlKind, up: float, down: float) -> None:
    found = kl_estimate(torch.tensor([-1.0, -3.0]), torch.tensor([-3.0, -1.0]), kind=kind)
    assert found.tolist() == pytest.approx([up, down])


def test_a_runaway_token_counts_no_more_than_the_bound() -> None:
    far = kl_estimate(torch.tensor([-90.0]), torch.tensor([-1.0]), kind="k3")
    assert far.tolist() == [10.0]
    with pytest.raises(ValueError, match="kl_kind is 'full'"):
        kl_estimate(far, far, kind="full")  # type: ignore[arg-type]
