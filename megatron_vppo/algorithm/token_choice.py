"""The tokens that carry policy gradient, and their weights: VPPO's filter, and what takes its place in ablations.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.soft_weights import pgpo_weights, sigmoid_weights
from megatron_vppo.algorithm.token_filter import top_token_mask
from megatron_vppo.algorithm.types import Response, Scores
from megatron_vppo.algorithm.vepo import vepo_scores
from megatron_vppo.algorithm.vgpo import vgpo_token_weights, visual_accumulation


def gradient_weights(
    responses: Sequence[Response],
    dependency_BT: Tensor | None,
    scores: Scores,
    mask_BT: Tensor,
    *,
    settings: VppoSettings,
) -> Tensor:
    """Returns the weight of each token's policy gradient: [B, T] float32; 0.0 where padded. With a mask it is 1 or 0.

    Args:
        dependency_BT: [B, T]; None if nothing needs it.
        mask_BT: [B, T], 1 on response tokens.
    """
    if not settings.use_vppo_on_perception:
        return mask_BT
    keep = partial(
        top_token_mask,
        mask_BT=mask_BT,
        keep_fraction=settings.top_p_perception_tokens,
        stable=settings.stable_ranking,
        integer_ceil=settings.integer_ceil,
    )
    if settings.token_scores == "random":
        weight_BT = keep(random_scores(responses, width=mask_BT.shape[1]).to(mask_BT.device))
    else:
        score_BT = _scores(responses, dependency_BT, scores, mask_BT, settings)
        weight_BT = keep(score_BT) if settings.token_weighting == "mask" else _weighted(score_BT, mask_BT, settings)
    if settings.token_scores == "dependency_or_entropy":
        weight_BT = torch.maximum(weight_BT, keep(scores.entropy_BT))
    if settings.text_only_rows == "rank":
        return weight_BT
    # 'bypass': a row without an image keeps all its tokens. Its dependencies are all zero, so ranking them says
    # nothing; other scores treat it alike, so that only the choice among tokens that see an image differs.
    return torch.where(has_image(responses).to(mask_BT.device)[:, None], weight_BT, mask_BT)


def random_scores(responses: Sequence[Response], *, width: int) -> Tensor:
    """Returns random numbers [B, T] that follow from the response alone, whatever rank or batch it is in."""
    score_BT = torch.zeros(len(responses), width)
    for score_T, response in zip(score_BT, responses, strict=True):
        place = f"{response.prompt.split}/{response.prompt.row}/{response.sample}/".encode()
        seed = hashlib.blake2b(place + array("i", response.token_ids).tobytes(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little", signed=True))
        score_T[: len(response.token_ids)] = torch.rand(len(response.token_ids), generator=generator)
    return score_BT


def has_image(responses: Sequence[Response]) -> Tensor:
    """Returns [B] bool."""
    return torch.tensor([bool(r.prompt.images) for r in responses])


def _scores(
    responses: Sequence[Response],
    dependency_BT: Tensor | None,
    scores: Scores,
    mask_BT: Tensor,
    settings: VppoSettings,
) -> Tensor:
    """Returns the numbers [B, T] by which tokens are ranked or weighed."""
    if settings.token_scores == "entropy":
        return scores.entropy_BT
    assert dependency_BT is not None, "VppoSettings.needs_dependency asks for it"
    if settings.token_scores != "vepo":
        return dependency_BT
    if scores.perturbed_entropy_BT is None:
        raise ValueError("token_scores 'vepo' needs perturbed_entropy_BT: score both views with a divergence")
    # A row without an image has one view, whose entropy is that of both.
    perturbed_BT = torch.where(
        has_image(responses).to(mask_BT.device)[:, None], scores.perturbed_entropy_BT, scores.entropy_BT
    )
    return vepo_scores(dependency_BT, scores.entropy_BT, perturbed_BT, mask_BT, alpha=settings.vepo_alpha)


def _weighted(score_BT: Tensor, mask_BT: Tensor, settings: VppoSettings) -> Tensor:
    if settings.token_weighting == "soft":
        return sigmoid_weights(score_BT, mask_BT, mean=settings.top_p_perception_tokens)
    if settings.token_weighting == "vgpo":
        accumulation_BT = visual_accumulation(
            score_BT, mask_BT, strength=settings.vgpo_strength, tail=settings.vgpo_tail, top=settings.vgpo_top
        )
        return vgpo_token_weights(accumulation_BT, mask_BT)
    return pgpo_weights(score_BT, mask_BT, tau=settings.pgpo_tau, beta=settings.pgpo_beta)
