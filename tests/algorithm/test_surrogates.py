"""Surrogate losses, against the objectives of their papers, differentiated by autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.surrogates import (
    cispo_surrogate,
    dual_clip_surrogate,
    gspo_surrogate,
    reinforce_surrogate,
    sapo_surrogate,
)

LENGTHS = (3, 1, 4)
OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.7, -3.0, -1.1, -0.2], dtype=torch.float64)
NEW = OLD + torch.tensor([0.3, -0.2, 0.9, -1.5, 0.02, 0.05, -0.6, 0.4], dtype=torch.float64)
ADVANTAGE = torch.tensor([1.5, -0.5, 0.7], dtype=torch.float64)
ADVANTAGE_N = ADVANTAGE.repeat_interleave(torch.tensor(LENGTHS))


def gradient(loss_of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    new = NEW.clone().requires_grad_()
    loss = loss_of(new)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped", "dual"),
    [
        (1.0, 0.5, False, False),
        (1.0, 1.0, False, False),
        (1.0, 1.5, True, False),
        (-1.0, 0.5, True, False),
        (-1.0, 1.0, False, False),
        (-1.0, 1.5, False, False),
        (-1.0, 4.0, False, True),
        (1.0, 4.0, True, False),
    ],
)
def test_which_tokens_count_as_clipped(advantage: float, ratio: float, clipped: bool, dual: bool) -> None:
    surrogate = dual_clip_surrogate(
        torch.tensor([ratio]).log(),
        torch.zeros(1),
        torch.tensor([advantage]),
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_dual=3.0,
    )
    assert surrogate.clipped_high_N.tolist() == [clipped]
    assert surrogate.clipped_dual_N.tolist() == [dual]


def test_a_ratio_on_the_dual_bound_does_not_exceed_it() -> None:
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_dual": 1.0}
    surrogate = dual_clip_surrogate(torch.zeros(1), torch.zeros(1), torch.tensor([-1.0]), **bounds)
    assert not surrogate.clipped_dual_N.any()


def test_log_ratios_beyond_20_count_as_20() -> None:
    surrogate = dual_clip_surrogate(
        torch.tensor([25.0]),
        torch.zeros(1),
        torch.tensor([-1.0]),
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_dual=1e30,
    )
    assert surrogate.loss_N.item() == pytest.approx(math.exp(20), rel=1e-6)


@pytest.mark.parametrize("bounds", [(0.2, 0.28), (3e-4, 4e-4), (0.5, 5.0)])
def test_gspo_is_the_objective_of_its_paper(bounds: tuple[float, float]) -> None:
    """Eq. 5: the mean over responses of min(s A, clip(s) A), s = exp of the mean log-ratio, with its whole gradient."""
    low, high = bounds

    def paper(new: Tensor) -> Tensor:
        parts = zip(new.split(LENGTHS), OLD.split(LENGTHS), ADVANTAGE, strict=True)
        ratios = [((mine - old).mean().exp(), advantage) for mine, old, advantage in parts]
        return -sum(torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a) for s, a in ratios) / len(LENGTHS)

    def ours(new: Tensor) -> Tensor:
        length_B = torch.tensor(LENGTHS)
        found = gspo_surrogate(new, OLD, ADVANTAGE_N, length_B, clip_ratio_low=low, clip_ratio_high=high)
        return (found.loss_N / length_B.repeat_interleave(length_B) / len(LENGTHS)).sum()

    expected, found = gradient(paper), gradient(ours)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-15)
    assert found[1].abs().max() > 0 or bounds == (3e-4, 4e-4)


def test_gspo_counts_whole_responses_as_clipped() -> None:
    """Mean log-ratios 1/3, -1.5 and -0.0325 with advantages of signs +, -, +."""
    found = gspo_surrogate(NEW, OLD, ADVANTAGE_N, torch.tensor(LENGTHS), clip_ratio_low=0.2, clip_ratio_high=0.28)
    assert found.clipped_high_N.tolist() == [True] * 3 + [True] + [False] * 4
    assert not found.clipped_dual_N.any()


def test_cispo_is_the_objective_of_its_paper() -> None:
    """Eq. 4: sg(clip(r)) A log p; the gradient of a token is -clip(r) A, also outside of the range."""
    weights = [min(max(math.exp(n - o), 0.8), 1.28) for n, o in zip(NEW.tolist(), OLD.tolist(), strict=True)]
    expected_N = -torch.tensor(weights, dtype=torch.float64) * ADVANTAGE_N

    def ours(new: Tensor) -> Tensor:
        return cispo_surrogate(new, OLD, ADVANTAGE_N, clip_ratio_low=0.2, clip_ratio_high=0.28).loss_N.sum()

    loss, found_N = gradient(ours)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=0)
    assert loss == pytest.approx((expected_N * NEW).sum().item(), rel=1e-12)
    found = cispo_surrogate(NEW, OLD, ADVANTAGE_N, clip_ratio_low=0.2, clip_ratio_high=0.28)
    assert found.clipped_high_N.tolist() == [True, False, True, True, False, False, False, True]


def test_sapo_is_the_objective_of_its_paper() -> None:
    """The gradient weight is 4 p (1 - p) r A with p = sigmoid(tau (r - 1)), the paper's Eq. 8; -A at r = 1."""
    ratio_N = (NEW - OLD).exp()
    tau_N = torch.where(ADVANTAGE_N > 0, 1.0, 1.05)
    gate_N = 1 / (1 + torch.exp(-tau_N * (ratio_N - 1)))

    def ours(new: Tensor) -> Tensor:
        return sapo_surrogate(new, OLD, ADVANTAGE_N, tau_positive=1.0, tau_negative=1.05).loss_N.sum()

    loss, found_N = gradient(ours)
    torch.testing.assert_close(found_N, -4 * gate_N * (1 - gate_N) * ratio_N * ADVANTAGE_N, rtol=1e-6, atol=0)
    assert loss == pytest.approx((-gate_N * 4 / tau_N * ADVANTAGE_N).sum().item(), rel=1e-6)


def test_reinforce_has_no_ratio() -> None:
    loss, found_N = gradient(lambda new: reinforce_surrogate(new, ADVANTAGE_N).loss_N.sum())
    assert torch.equal(found_N, -ADVANTAGE_N) and loss == pytest.approx(-(ADVANTAGE_N * NEW).sum().item())
    found = reinforce_surrogate(NEW, ADVANTAGE_N)
    assert not found.clipped_high_N.any() and not found.clipped_dual_N.any()


def test_all_have_the_same_gradient_where_the_policy_has_not_moved() -> None:
    bounds = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    length_B = torch.tensor(LENGTHS)
    for surrogate in (
        lambda new: dual_clip_surrogate(new, NEW, ADVANTAGE_N, **bounds, clip_ratio_dual=3.0),
        lambda new: gspo_surrogate(new, NEW, ADVANTAGE_N, length_B, **bounds),
        lambda new: cispo_surrogate(new, NEW, ADVANTAGE_N, **bounds),
        lambda new: sapo_surrogate(new, NEW, ADVANTAGE_N, tau_positive=1.0, tau_negative=1.05),
        lambda new: reinforce_surrogate(new, ADVANTAGE_N),
    ):
        _, found_N = gradient(lambda new, surrogate=surrogate: surrogate(new).loss_N.sum())
        torch.testing.assert_close(found_N, -ADVANTAGE_N, rtol=1e-6, atol=0)
