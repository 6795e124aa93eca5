"""From graded responses to the optimizer mini-batches of a step.

Every mask, scale and weight of the loss is computed here, before the first update; the update only multiplies by them.
"Reference" and "the authors" mean the published code of the paper, whose choices some settings reproduce.

Shape suffix legend: B = responses of the step or of one mini-batch; T = response tokens, right-padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_vppo.algorithm.advantages import advantages
from megatron_vppo.algorithm.dependency import k3_sampled
from megatron_vppo.algorithm.kl import kl_estimate
from megatron_vppo.algorithm.metrics import advantage_metrics, minibatch_metrics
from megatron_vppo.algorithm.padding import length_mask, pad_rows
from megatron_vppo.algorithm.perception import perception_terms
from megatron_vppo.algorithm.response_scales import response_scales, trained_rows
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.shaping import TrajectoryScale, dependency_means, shape_advantages
from megatron_vppo.algorithm.token_choice import gradient_weights, has_image
from megatron_vppo.algorithm.token_weights import entropy_penalty_weight, policy_gradient_weight, rollout_correction
from megatron_vppo.algorithm.types import GradedResponse, LossSpec, Response, Scores, TrainBatch


@dataclass(frozen=True, slots=True)
class VppoRecord:
    """VPPO's decisions about one mini-batch, for the log and the report."""

    dependency_BT: Tensor | None
    """fp32 nats; 0.0 where padded and for rows without an image. None if neither filter nor shaping needs it."""
    token_mask_BT: Tensor
    """fp32; 1.0 on the tokens that the filter keeps, also those of a response that is not trained on; with soft weights
    on all that have some."""
    scale_B: Tensor
    """fp32; alpha, the factor of each response's advantage (paper Eq. 5). Where the advantage is negative,
    `negative_advantages` may replace it."""
    dependency_mean_B: Tensor | None
    """fp32 nats; the mean dependency of each response."""
    group_advantage_B: Tensor
    """fp32; before shaping."""


@dataclass(frozen=True, slots=True)
class Minibatch:
    """One optimizer mini-batch, with the decisions behind it."""

    batch: TrainBatch
    record: VppoRecord
    metrics: dict[str, float]


def assemble(
    graded: Sequence[GradedResponse],
    scores: Scores,
    *,
    settings: VppoSettings,
    responses_per_minibatch: int,
    data_parallel_size: int = 1,
    micro_batch_size: int = 1,
    longest_response: int = 1,
) -> list[Minibatch]:
    """Splits a step's responses, in order, into optimizer mini-batches with all weights of their loss.

    With shaping_min_scope and shaping_mean_scope at 'minibatch' the result does not depend on data_parallel_size or
    micro_batch_size. Only the authors' scopes, 'device_minibatch' and 'microbatch', read them.

    Args:
        graded: the responses of the step; the responses of a group lie next to each other.
        scores: the scores of these responses; T is at least the longest response.
        responses_per_minibatch: rows per optimizer step; the last mini-batch takes what is left.
        data_parallel_size: the number of devices whose split of the rows the scope 'device_minibatch' imitates;
            settings.reference_devices replaces it if set.
        micro_batch_size: rows of the micro-batches that the scope 'microbatch' imitates.
        longest_response: the limit of a response's tokens, which loss_avg_mode 'fixed_length' divides by.

    Raises:
        ValueError: rows and scores do not match, the perturbed view or a divergence is missing, or a group has one
            response.
        RuntimeError: the scores hold NaN or infinity.
    """
    responses = tuple(item.response for item in graded)
    _check_scores(responses, scores, settings)
    if responses_per_minibatch < 1:
        raise ValueError(
            f"responses_per_minibatch is {responses_per_minibatch}; set actor.global_batch_size (prompts) to at least 1"
        )
    width, device = scores.old_logp_BT.shape[1], scores.old_logp_BT.device
    mask_BT = length_mask([len(r.token_ids) for r in responses], width=width).to(device)
    dependency_BT = visual_dependency(responses, scores, mask_BT, settings=settings)
    rows_of_minibatches = [
        slice(start, min(start + responses_per_minibatch, len(responses)))
        for start in range(0, len(responses), responses_per_minibatch)
    ]
    scales = response_scales(
        responses,
        dependency_BT,
        rows_of_minibatches,
        settings=settings,
        devices=settings.reference_devices or data_parallel_size,
        micro_batch_size=micro_batch_size,
    )
    reward_B = torch.tensor([item.reward.overall for item in graded], dtype=torch.float32)
    if settings.shaping_in == "reward":
        reward_B = reward_B * torch.cat([scale.scale_B for scale in scales]).cpu()
    if settings.kl_coef and settings.kl_in == "reward":
        reward_B = reward_B - settings.kl_coef * _reference_kl(scores, mask_BT, settings).sum(1).cpu()
    group_B = torch.tensor([r.group_id for r in responses], dtype=torch.int64)
    # Over the whole step, so that a mini-batch boundary within a group does not change the group's baseline.
    advantage_B = advantages(reward_B, group_B, kind=settings.advantage).to(device)
    return [
        _assemble_rows(
            responses[rows],
            scores.rows(rows),
            mask_BT[rows],
            advantage_B[rows],
            None if dependency_BT is None else dependency_BT[rows],
            scale,
            settings=settings,
            longest_response=longest_response,
        )
        for rows, scale in zip(rows_of_minibatches, scales, strict=True)
    ]


def visual_dependency(
    responses: Sequence[Response], scores: Scores, mask_BT: Tensor, *, settings: VppoSettings
) -> Tensor | None:
    """Computes the dependency [B, T] in fp32, of the kind that is set; None if nothing needs it.

    Rows without an image have dependency zero: there is nothing to perturb.
    """
    if not settings.needs_dependency:
        return None
    if settings.dependency == "k3_sampled":
        if scores.perturbed_logp_BT is None:
            raise ValueError("dependency 'k3_sampled' needs perturbed_logp_BT: score both views of every response")
        dependency_BT = k3_sampled(
            scores.old_logp_BT, scores.perturbed_logp_BT, mask_BT, expm1=settings.dependency_expm1
        )
    elif settings.dependency == "visual_focus":
        if scores.visual_focus_BT is None:
            raise ValueError("dependency 'visual_focus' needs visual_focus_BT: score with visual_focus=True")
        dependency_BT = (1.0 + scores.visual_focus_BT) / 2.0  # VGPO's Eq. 4
    else:
        if scores.divergence_BT is None:
            raise ValueError(
                f"dependency {settings.dependency!r} needs divergence_BT: score both views with this kind of divergence"
            )
        dependency_BT = scores.divergence_BT
        if settings.dependency != "top1_drop":
            dependency_BT = dependency_BT.clamp(min=0.0)  # it may round below zero
    has_image_B = has_image(responses).to(mask_BT.device)
    return torch.where(has_image_B[:, None] & mask_BT.bool(), dependency_BT, 0.0).float()


def _assemble_rows(
    responses: tuple[Response, ...],
    scores: Scores,
    mask_BT: Tensor,
    advantage_B: Tensor,
    dependency_BT: Tensor | None,
    scale: TrajectoryScale,
    *,
    settings: VppoSettings,
    longest_response: int,
) -> Minibatch:
    trained_BT = mask_BT * trained_rows(responses, settings).to(mask_BT.device)[:, None]
    weight_BT = gradient_weights(responses, dependency_BT, scores, mask_BT, settings=settings)
    token_mask_BT = (weight_BT > 0).float()
    dependency_mean_B = None if dependency_BT is None else dependency_means(dependency_BT, mask_BT)
    shaped_B = advantage_B
    if settings.shaping_in == "advantage":
        scale_B = scale.scale_B.to(advantage_B.device)
        shaped_B = shape_advantages(advantage_B, scale_B, negative=settings.negative_advantages)
    average = partial(policy_gradient_weight, average=settings.loss_avg_mode, fixed_length=longest_response)
    pg_weight_BT = average(weight_BT, trained_BT, denominator=settings.loss_denominator)
    centering_weight_BT = pg_weight_BT if settings.score_centering_tokens else None
    correction_BT = None
    if settings.rollout_correction_cap is not None:
        rollout_logp_BT = _rollout_logps(responses, width=mask_BT.shape[1]).to(mask_BT.device)
        correction_BT = rollout_correction(
            scores.old_logp_BT,
            rollout_logp_BT,
            mask_BT,
            cap=settings.rollout_correction_cap,
            kind=settings.rollout_correction,
        )
        pg_weight_BT = pg_weight_BT * correction_BT
        if centering_weight_BT is not None and settings.rollout_correction != "token":
            centering_weight_BT = pg_weight_BT
    kl_in_loss = settings.kl_coef > 0 and settings.kl_in == "loss"
    batch = TrainBatch(
        responses=responses,
        old_logp_BT=scores.old_logp_BT,
        advantage_BT=shaped_B[:, None] * mask_BT,
        pg_weight_BT=pg_weight_BT,
        entropy_weight_BT=entropy_penalty_weight(
            token_mask_BT,
            trained_BT,
            coefficient=settings.entropy_penalty_coef if settings.use_entropy_penalty else 0.0,
            tokens=settings.entropy_tokens,
        ),
        response_mask_BT=mask_BT,
        loss=LossSpec(
            clip_ratio_low=settings.clip_ratio_low,
            clip_ratio_high=settings.clip_ratio_high,
            clip_ratio_dual=settings.clip_ratio_dual,
            entropy_kind=settings.entropy_kind,
            kl_kind=settings.kl_kind,
            policy_loss=settings.policy_loss,
            sapo_tau_positive=settings.sapo_tau_positive,
            sapo_tau_negative=settings.sapo_tau_negative,
            centering_cap=settings.rollout_correction_cap if settings.rollout_correction == "token" else None,
        ),
        reference_logp_BT=scores.reference_logp_BT if kl_in_loss else None,
        kl_weight_BT=settings.kl_coef * average(mask_BT, trained_BT, denominator="all") if kl_in_loss else None,
        centering_weight_BT=centering_weight_BT,
        perception=perception_terms(responses, scores, trained_BT, settings=settings, fixed_length=longest_response),
    )
    record = VppoRecord(dependency_BT, token_mask_BT, scale.scale_B, dependency_mean_B, advantage_B)
    metrics = minibatch_metrics(
        dependency_BT, token_mask_BT, trained_BT, mask_BT, dependency_mean_B, scale, correction_BT=correction_BT
    )
    if settings.kl_coef:
        metrics["actor/reference_kl"] = (_reference_kl(scores, mask_BT, settings).sum() / mask_BT.sum()).item()
    return Minibatch(batch, record, {**metrics, **advantage_metrics(batch.advantage_BT, trained_BT)})


def _reference_kl(scores: Scores, mask_BT: Tensor, settings: VppoSettings) -> Tensor:
    """Estimates the old policy's divergence from the reference model: [B, T] nats; 0.0 where padded."""
    if scores.reference_logp_BT is None:
        raise ValueError("kl_coef needs reference_logp_BT: score the responses by a reference model too")
    divergence_BT = kl_estimate(scores.old_logp_BT, scores.reference_logp_BT, kind=settings.kl_kind)
    return torch.where(mask_BT.bool(), divergence_BT, 0.0)


def _rollout_logps(responses: Sequence[Response], *, width: int) -> Tensor:
    for row, response in enumerate(responses):
        if len(response.rollout_logps) != len(response.token_ids):
            raise ValueError(
                f"rollout_correction_cap needs the rollout's log-probs, but response {row} has "
                f"{len(response.rollout_logps)} of them for {len(response.token_ids)} tokens"
            )
    return pad_rows([r.rollout_logps for r in responses], dtype=torch.float32, width=width)


def _check_scores(responses: Sequence[Response], scores: Scores, settings: VppoSettings) -> None:
    if len(responses) == 0:
        raise ValueError("no responses to train on; skip the step instead")
    wanted = {"old_logp_BT": scores.old_logp_BT}
    if settings.kl_coef and scores.reference_logp_BT is not None:
        wanted["reference_logp_BT"] = scores.reference_logp_BT
    if settings.needs_dependency and scores.perturbed_logp_BT is not None:
        wanted["perturbed_logp_BT"] = scores.perturbed_logp_BT
    if settings.divergence is not None and scores.divergence_BT is not None:
        wanted["divergence_BT"] = scores.divergence_BT
    if settings.needs_visual_focus and scores.visual_focus_BT is not None:
        wanted["visual_focus_BT"] = scores.visual_focus_BT
    for name, value_BT in wanted.items():
        if value_BT.dim() != 2 or value_BT.shape != scores.old_logp_BT.shape or len(value_BT) != len(responses):
            raise ValueError(
                f"scores.{name} has shape {list(value_BT.shape)} for {len(responses)} responses "
                f"and old_logp_BT of {list(scores.old_logp_BT.shape)}"
            )
        bad_B = ~value_BT.isfinite().all(1)
        if bool(bad_B.any()):
            raise RuntimeError(
                f"scores.{name} has NaN or infinite entries in {int(bad_B.sum())} of {len(responses)} rows, first row "
                f"{int(bad_B.nonzero()[0])}; the model's weights or the images of that row are broken"
            )
