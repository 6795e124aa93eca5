"""The loss of the update: the policy's surrogate, the entropy term, and what methods add; docs/algorithm.md, "Loss".

Shape suffix legend: N = response tokens of any number of responses, flat, without padding; B = these responses; R =
statistics per position, one for each of the engine's likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.algorithm.kl import kl_estimate
from megatron_vppo.algorithm.perception import PerturbedView, perception_loss
from megatron_vppo.algorithm.score_centering import score_centering
from megatron_vppo.algorithm.surrogates import (
    Surrogate,
    cispo_surrogate,
    dual_clip_surrogate,
    gspo_surrogate,
    reinforce_surrogate,
    sapo_surrogate,
)
from megatron_vppo.algorithm.types import LossSpec, TokenTerms


@dataclass(frozen=True, slots=True)
class LossSums:
    """The loss of some tokens of a mini-batch. Everything in it adds up over any split of the mini-batch."""

    loss: Tensor
    """A scalar with gradient."""
    weighted_sums: Mapping[str, Tensor]
    """Detached scalars by metric; their sums over the mini-batch are final."""
    token_sums: Mapping[str, Tensor]
    """Detached scalars by metric; divide their sums over the mini-batch by its number of response tokens."""


def surrogate_loss(
    new_logp_N: Tensor,
    terms: TokenTerms,
    *,
    spec: LossSpec,
    entropy_N: Tensor | None = None,
    likeliest_logp_NR: Tensor | None = None,
    perturbed: PerturbedView | None = None,
) -> LossSums:
    """Computes the loss of a micro-batch's tokens: sum(pg_weight * surrogate) + sum(entropy_weight * entropy term), and
    with a reference model + sum(kl_weight * divergence); see also perception_loss.

    The weights hold masks, denominators and coefficients (see token_weights.py), so the losses of the micro-batches add
    up to the loss of the mini-batch, and so do their gradients.

    Args:
        new_logp_N: [N] fp32 nats, with gradient.
        terms: the mini-batch at these tokens.
        entropy_N: [N] nats; the entropy of the full distribution, with gradient. entropy_kind 'entropy' needs it;
            otherwise it is only reported.
        likeliest_logp_NR: [N, R] nats, with gradient; of the engine's likeliest tokens. None without score centering.
        perturbed: these tokens given the perturbed images, if the update reads them; `terms` has them if they are
            constant.
    """
    surrogate = policy_surrogate(new_logp_N, terms, spec=spec)
    pg_loss = (terms.pg_weight_N * surrogate.loss_N).sum()
    penalty = (terms.entropy_weight_N * _entropy_term(new_logp_N, entropy_N, kind=spec.entropy_kind)).sum()
    token_sums = {
        "actor/ppo_kl": (terms.old_logp_N - new_logp_N).detach().sum(),
        "actor/entropy_loss": -new_logp_N.detach().sum(),
        "actor/pg_clipfrac_higher": surrogate.clipped_high_N.sum().to(torch.float32),
        "actor/pg_clipfrac_lower": surrogate.clipped_dual_N.sum().to(torch.float32),
    }
    if entropy_N is not None:
        token_sums["actor/entropy"] = entropy_N.detach().sum()
    loss = pg_loss + penalty
    weighted_sums = {"actor/pg_loss": pg_loss.detach(), "actor/entropy_penalty": penalty.detach()}
    if terms.reference_logp_N is not None and terms.kl_weight_N is not None:
        divergence_N = kl_estimate(new_logp_N, terms.reference_logp_N, kind=spec.kl_kind)
        kl_loss = (terms.kl_weight_N * divergence_N).sum()
        loss = loss + kl_loss
        weighted_sums["actor/kl_loss"] = kl_loss.detach()
    if likeliest_logp_NR is not None:
        assert terms.likeliest is not None, "TrainBatch.terms_at has them where centering is on"
        centering_N = score_centering(likeliest_logp_NR, terms.likeliest.rollout_logp_NR, cap=spec.centering_cap)
        centering = (terms.likeliest.weight_N * terms.advantage_N * centering_N).sum()
        loss = loss + centering
        weighted_sums["actor/score_centering"] = centering.detach()
    if terms.perception is not None:
        if perturbed is None:
            assert terms.perception.perturbed_logp_N is not None, "the update reads the perturbed views"
            perturbed = PerturbedView(terms.perception.perturbed_logp_N)
        perception = perception_loss(new_logp_N, perturbed, terms.perception, entropy_kind=spec.entropy_kind)
        loss = loss + perception.loss
        weighted_sums |= perception.weighted_sums
        token_sums |= perception.token_sums
    weighted_sums["actor/loss"] = loss.detach()
    return LossSums(loss=loss, weighted_sums=weighted_sums, token_sums=token_sums)


def policy_surrogate(new_logp_N: Tensor, terms: TokenTerms, *, spec: LossSpec) -> Surrogate:
    """Computes the surrogate of the kind that is set. Raises ValueError if there is no such kind."""
    old_logp_N, advantage_N = terms.old_logp_N, terms.advantage_N
    low, high = spec.clip_ratio_low, spec.clip_ratio_high
    if spec.policy_loss == "clip":
        return dual_clip_surrogate(
            new_logp_N,
            old_logp_N,
            advantage_N,
            clip_ratio_low=low,
            clip_ratio_high=high,
            clip_ratio_dual=spec.clip_ratio_dual,
        )
    if spec.policy_loss == "gspo":
        assert terms.length_B is not None, "TrainBatch.terms_at counts the tokens of each row for this loss"
        return gspo_surrogate(
            new_logp_N, old_logp_N, advantage_N, terms.length_B, clip_ratio_low=low, clip_ratio_high=high
        )
    if spec.policy_loss == "cispo":
        return cispo_surrogate(new_logp_N, old_logp_N, advantage_N, clip_ratio_low=low, clip_ratio_high=high)
    if spec.policy_loss == "sapo":
        return sapo_surrogate(
            new_logp_N,
            old_logp_N,
            advantage_N,
            tau_positive=spec.sapo_tau_positive,
            tau_negative=spec.sapo_tau_negative,
        )
    if spec.policy_loss == "reinforce":
        return reinforce_surrogate(new_logp_N, advantage_N)
    raise ValueError(f"policy_loss is {spec.policy_loss!r}; set it to 'clip', 'gspo', 'cispo', 'sapo' or 'reinforce'")


def _entropy_term(new_logp_N: Tensor, entropy_N: Tensor | None, *, kind: str) -> Tensor:
    """Returns what the penalty lowers: -log pi of the sampled token (the authors'), or the full entropy."""
    if kind == "nll":
        return -new_logp_N
    if kind != "entropy":
        raise ValueError(f"entropy_kind is {kind!r}; set it to 'nll' or 'entropy'")
    if entropy_N is None:
        raise ValueError("entropy_kind 'entropy' needs entropy_N with gradient; ask the vocabulary head for it")
    return entropy_N
