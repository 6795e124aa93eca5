"""The loss of tokens: its entropy term, its sums, and the kind that is set."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.types import LossSpec, TokenTerms


def test_entropy_term_by_kind() -> None:
    logp_N, entropy_N = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.25])
    zero_N, weight_N = torch.zeros(2), torch.tensor([0.1, 0.2])

    def loss(kind: str, entropy_N: torch.Tensor | None) -> float:
        spec = LossSpec(
            clip_ratio_low=0.2,
            clip_ratio_high=0.28,
            clip_ratio_dual=3.0,
            entropy_kind=kind,
            kl_kind="k3",
            policy_loss="clip",
            sapo_tau_positive=1.0,
            sapo_tau_negative=1.05,
        )
        terms = TokenTerms(logp_N, zero_N, zero_N, weight_N)
        return surrogate_loss(logp_N, terms, spec=spec, entropy_N=entropy_N).loss.item()

    assert loss("nll", entropy_N) == pytest.approx(0.1 + 0.4)
    assert loss("entropy", entropy_N) == pytest.approx(0.05 + 0.05)
    with pytest.raises(ValueError, match="needs entropy_N"):
        loss("entropy", None)
    with pytest.raises(ValueError, match="'gini'"):
        loss("gini", entropy_N)


def test_token_sums_of_two_tokens() -> None:
    new_logp_N, old_logp_N, ones_N = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -4.0]), torch.ones(2)
    spec = LossSpec(
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_dual=3.0,
        entropy_kind="nll",
        kl_kind="k3",
        policy_loss="clip",
        sapo_tau_positive=1.0,
        sapo_tau_negative=1.05,
    )
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


def test_the_surrogate_is_that_of_the_kind() -> None:
    """Ratios 2 and 1, advantages 1 and -1: each kind has another loss; the sequence's ratio is the square root of 2."""
    new_logp_N, old_logp_N, ones_N = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 - math.log(2), -2.0]), torch.ones(2)
    terms = TokenTerms(old_logp_N, torch.tensor([1.0, -1.0]), ones_N, 0 * ones_N, torch.tensor([2]))

    def loss(kind: str) -> float:
        spec = LossSpec(
            clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=3.0, entropy_kind="nll", kl_kind="k3",
            policy_loss=kind, sapo_tau_positive=1.0, sapo_tau_negative=2.0,
        )  # fmt: skip
        return surrogate_loss(new_logp_N, terms, spec=spec).loss.item()

    assert loss("clip") == pytest.approx(-1.28 + 1.0)
    assert loss("gspo") == pytest.approx(-1.28 + 2**0.5)
    assert loss("cispo") == pytest.approx(1.28 * 1.0 - 2.0)
    assert loss("sapo") == pytest.approx(-4 / (1 + math.exp(-1.0)) + 2 * 0.5)
    with pytest.raises(ValueError, match="policy_loss is 'ppo'"):
        loss("ppo")
