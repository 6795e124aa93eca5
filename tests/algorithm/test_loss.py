"""The surrogate loss: its entropy term, and the tokens that count as clipped."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vppo.algorithm.loss import dual_clip_surrogate, surrogate_loss
from megatron_vppo.algorithm.types import LossSpec, TokenTerms


def test_entropy_term_by_kind() -> None:
    logp_N, entropy_N = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.25])
    zero_N, weight_N = torch.zeros(2), torch.tensor([0.1, 0.2])

    def loss(kind: str, entropy_N: torch.Tensor | None) -> float:
        spec = LossSpec(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=3.0, entropy_kind=kind)
        terms = TokenTerms(logp_N, zero_N, zero_N, weight_N)
        return surrogate_loss(logp_N, terms, spec=spec, entropy_N=entropy_N).loss.item()

    assert loss("nll", entropy_N) == pytest.approx(0.1 + 0.4)
    assert loss("entropy", entropy_N) == pytest.approx(0.05 + 0.05)
    with pytest.raises(ValueError, match="needs entropy_N"):
        loss("entropy", None)
    with pytest.raises(ValueError, match="'gini'"):
        loss("gini", entropy_N)


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


def test_token_sums_of_two_tokens() -> None:
    new_logp_N, old_logp_N, ones_N = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -4.0]), torch.ones(2)
    spec = LossSpec(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=3.0, entropy_kind="nll")
    terms = TokenTerms(old_logp_N, torch.tensor([1.0, -1.0]), ones_N, ones_N)
    without = surrogate_loss(new_logp_N, terms, spec=spec).token_sums
    expected = {  # ratios e^0.5 and e^2
        "actor/ppo_kl": -0.5 - 2.0,
        "actor/entropy_loss": 1.0 + 2.0,
        "actor/pg_clipfrac_higher": 1.0,
        "actor/pg_clipfrac_lower": 1.0,
    }
    assert {name: value.item() for name, value in without.items()} == pytest.approx(expected)
    reported = surrogate_loss(new_logp_N, terms, spec=spec, entropy_N=torch.tensor([0.5, 0.25])).token_sums
    assert {name: value.item() for name, value in reported.items()} == pytest.approx(
        {**expected, "actor/entropy": 0.75}
    )
