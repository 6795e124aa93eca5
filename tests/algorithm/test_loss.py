"""The loss of tokens: its entropy term, its sums, and the kind that is set."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.types import LikeliestTerms, LossSpec, TokenTerms


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
    assert loss("reinforce") == pytest.approx(1.0 - 2.0)
    assert loss("sapo") == pytest.approx(-4 / (1 + math.exp(-1.0)) + 2 * 0.5)
    with pytest.raises(ValueError, match="policy_loss is 'ppo'"):
        loss("ppo")


def test_score_centering_is_added() -> None:
    """Position 1: q (0.5, 0.25) and p (0.5, 0.125) of two tokens; the others have 0.25 and 0.375, so t = 2/3, and the
    term is (1/2 - 1/3) log 0.5 + (1/4 - 1/12) log 0.125 = -4/6 log 2. Weight 0.3 and advantage -2. At position 2 p and
    q are equal, and so nothing is left: t = 1.
    """
    p_NR, q_NR = torch.tensor([[0.5, 0.125], [0.5, 0.25]]), torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    ids_NR, ones_N = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2)
    likeliest = LikeliestTerms(ids_NR, q_NR.log(), torch.tensor([0.3, 0.7]))
    terms = TokenTerms(-ones_N, torch.tensor([-2.0, 1.0]), 0 * ones_N, 0 * ones_N, likeliest=likeliest)
    spec = LossSpec(
        clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=3.0, entropy_kind="nll", kl_kind="k3",
        policy_loss="reinforce", sapo_tau_positive=1.0, sapo_tau_negative=1.05,
    )  # fmt: skip
    found = surrogate_loss(-ones_N, terms, spec=spec, likeliest_logp_NR=p_NR.log())
    assert found.loss.item() == pytest.approx(0.3 * -2.0 * -4 / 6 * math.log(2), rel=1e-6)
    assert found.weighted_sums["actor/score_centering"].item() == pytest.approx(found.loss.item())
    capped = dataclasses.replace(spec, centering_cap=0.5)
    # Weights of half at most: q w is (0.25, 0.125), and t w is 1/3: (1/4 - 1/6) and (1/8 - 1/24).
    found = surrogate_loss(-ones_N, terms, spec=capped, likeliest_logp_NR=p_NR.log())
    expected = 0.3 * -2.0 * (1 / 12 * math.log(0.5) + 1 / 12 * math.log(0.125))
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)
