"""PAPO's part of the loss: the implicit perception loss, and the entropy of the perturbed view.

Perception-Aware Policy Optimization (arXiv 2507.06448, Eq. 2): the policy's distributions given the original and the
perturbed image are to differ, so their divergence is subtracted from the loss. It has no bound. The entropy terms of
both views keep the policy from raising it by words that mean nothing; that of the original view is the entropy penalty
of every other method (token_weights.py). docs/algorithm.md, "PAPO", says where paper and code differ.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens of any number of responses,
flat, without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_vppo.algorithm.kl import kl_estimate
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.token_choice import has_image
from megatron_vppo.algorithm.token_weights import entropy_penalty_weight, policy_gradient_weight
from megatron_vppo.algorithm.types import PerceptionTerms, Response, Scores, TokenPerception


@dataclass(frozen=True, slots=True)
class PerturbedView:
    """The present policy given the perturbed images. A row without an image has its original view in this place."""

    logp_N: Tensor
    """fp32 nats; log-probs of the response tokens, with gradient if the update reads this view."""
    entropy_N: Tensor | None = None
    """Nats; the entropy of the full distribution, if the entropy terms are of that kind."""


def perception_terms(
    responses: Sequence[Response],
    scores: Scores,
    trained_BT: Tensor,
    *,
    settings: VppoSettings,
    fixed_length: int,
) -> PerceptionTerms | None:
    """Weighs the perception loss of a mini-batch: a mean as `loss_avg_mode` says, and a token mean of the entropy term.

    Rows without an image count in the denominators and have no term: their divergence is zero.

    Args:
        trained_BT: [B, T], 1 on all response tokens of responses that are trained on.
        fixed_length: as in policy_gradient_weight.

    Raises:
        ValueError: the scores lack what says which perturbed views there are.
    """
    if not settings.perception_loss_coef:
        return None
    both = settings.updates_both_views
    if both and len(scores.perturb_keys) != len(responses):
        raise ValueError(
            f"scores have {len(scores.perturb_keys)} perturb_keys for {len(responses)} responses; perception_gradient "
            "'both_views' needs one of each"
        )
    if not both and scores.perturbed_logp_BT is None:
        raise ValueError(
            "perception_gradient 'original_view' needs perturbed_logp_BT: score both views of every response"
        )
    seen_BT = trained_BT * has_image(responses).to(trained_BT.device)[:, None]
    mean_BT = policy_gradient_weight(
        seen_BT, trained_BT, denominator="all", average=settings.loss_avg_mode, fixed_length=fixed_length
    )
    entropy_BT = entropy_penalty_weight(
        trained_BT, trained_BT, coefficient=settings.perturbed_entropy_coef, tokens="all"
    )
    return PerceptionTerms(
        weight_BT=settings.perception_loss_coef * mean_BT,
        entropy_weight_BT=entropy_BT * seen_BT if both else None,
        perturb_keys=scores.perturb_keys if both else None,
        perturbed_logp_BT=None if both else scores.perturbed_logp_BT,
    )


@dataclass(frozen=True, slots=True)
class PerceptionSums:
    """The perception loss of some tokens, as LossSums."""

    loss: Tensor
    weighted_sums: Mapping[str, Tensor]
    token_sums: Mapping[str, Tensor]


def perception_loss(
    logp_N: Tensor, perturbed: PerturbedView, terms: TokenPerception, *, entropy_kind: str
) -> PerceptionSums:
    """Computes sum(entropy_weight * entropy term of the perturbed view) - sum(weight * divergence).

    The divergence is k3 of x = log p_perturbed - log p_original (the authors' low_var_kl): exp(x) - 1 - x, with x
    limited to 20 nats and the result to 10. Of original tokens it estimates KL(original || perturbed).

    Args:
        logp_N: [N] fp32 nats; the present log-probs given the original images, with gradient.
        perturbed: the same tokens given the perturbed images.
        entropy_kind: as in surrogate_loss.
    """
    divergence_N = kl_estimate(logp_N, perturbed.logp_N, kind="k3")
    loss = -(terms.weight_N * divergence_N).sum()
    weighted_sums = {"actor/perception_loss": loss.detach()}
    if terms.entropy_weight_N is not None:
        entropy_N = -perturbed.logp_N if entropy_kind == "nll" else perturbed.entropy_N
        assert entropy_N is not None, "the vocabulary head gives both views' entropies, or none"
        penalty = (terms.entropy_weight_N * entropy_N).sum()
        weighted_sums["actor/perturbed_entropy_penalty"] = penalty.detach()
        loss = loss + penalty
    return PerceptionSums(
        loss=loss,
        weighted_sums=weighted_sums,
        token_sums={
            "actor/kl_prcp_loss": -(divergence_N.detach() * (terms.weight_N > 0)).sum(),
            "actor/aug_entropy_loss": -perturbed.logp_N.detach().sum(),
        },
    )
