"""The scale of each response by its dependency on the image: VPPO's, or what others put in its place.

Shape suffix legend: B = responses of the step or of one mini-batch; T = response tokens, right-padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.reference_split import emulated_split
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.shaping import TrajectoryScale, dependency_means, trajectory_scale
from megatron_vppo.algorithm.token_choice import has_image
from megatron_vppo.algorithm.types import Response
from megatron_vppo.algorithm.vgpo import vgpo_scales, visual_accumulation


def response_scales(
    responses: Sequence[Response],
    dependency_BT: Tensor | None,
    minibatches: Sequence[slice],
    *,
    settings: VppoSettings,
    devices: int,
    micro_batch_size: int,
) -> list[TrajectoryScale]:
    """Computes the scales of a step's responses, for each mini-batch; ones without shaping.

    Args:
        dependency_BT: [B, T]; None if nothing needs it.
        minibatches: the rows of each.
        devices, micro_batch_size: the split that the authors' scopes emulate.
    """
    if not settings.use_advantage_shaping or dependency_BT is None:
        return [_of(torch.ones(rows.stop - rows.start)) for rows in minibatches]
    mask_BT = length_mask([len(r.token_ids) for r in responses], width=dependency_BT.shape[1]).to(dependency_BT.device)
    # Only these rows enter the statistics; the others get scale 1.
    counted_B = trained_rows(responses, settings).to(mask_BT.device).bool() & mask_BT.any(1)
    if settings.text_only_rows == "bypass":
        counted_B &= has_image(responses).to(counted_B.device)
    if settings.shaping_kind == "vgpo":
        group_B = torch.tensor([r.group_id for r in responses], dtype=torch.int64, device=mask_BT.device)
        accumulation_BT = visual_accumulation(
            dependency_BT, mask_BT, strength=settings.vgpo_strength, tail=settings.vgpo_tail, top=settings.vgpo_top
        )
        scale_B = vgpo_scales(accumulation_BT, counted_B, group_B)
        return [_of(scale_B[rows]) for rows in minibatches]
    mean_B = dependency_means(dependency_BT, mask_BT)
    return [
        _vppo_scale(mean_B[rows], counted_B[rows], settings, devices=devices, micro_batch_size=micro_batch_size)
        for rows in minibatches
    ]


def trained_rows(responses: Sequence[Response], settings: VppoSettings) -> Tensor:
    """Returns [B] 1.0 for responses that are trained on; truncated_responses='mask' leaves out truncated ones."""
    masks_truncated = settings.truncated_responses == "mask"
    return torch.tensor([0.0 if masks_truncated and r.finish_reason == "length" else 1.0 for r in responses])


def _vppo_scale(
    mean_B: Tensor, counted_B: Tensor, settings: VppoSettings, *, devices: int, micro_batch_size: int
) -> TrajectoryScale:
    device_B, micro_batch_B = (
        number_B.to(counted_B.device)
        for number_B in emulated_split(len(counted_B), devices=devices, micro_batch_size=micro_batch_size)
    )
    return trajectory_scale(
        mean_B,
        counted_B,
        scale_min=settings.advantage_scaling_min,
        scale_max=settings.advantage_scaling_max,
        min_scope_B=device_B if settings.shaping_min_scope == "device_minibatch" else None,
        mean_scope_B=micro_batch_B if settings.shaping_mean_scope == "microbatch" else None,
    )


def _of(scale_B: Tensor) -> TrajectoryScale:
    return TrajectoryScale(scale_B, smallest_means=(), largest_means=(), target_maxima=())
