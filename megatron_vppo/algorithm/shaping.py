"""Trajectory advantage shaping (paper Eq. 5): visually dependent responses count more, with a mean scale of one.

Shape suffix legend: B = responses; T = response tokens, right-padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.config.choices import NegativeAdvantages

MIN_RANGE = 1e-6
"""Nats; rows whose mean dependencies span no more than this keep scale one."""
MEAN_EPS = 1e-8
"""Added to the mean of relative dependencies, as the authors' code does."""


@dataclass(frozen=True, slots=True)
class TrajectoryScale:
    """Advantage scales and the statistics behind them."""

    scale_B: Tensor
    """[B]; 1.0 for rows that were not counted."""
    smallest_means: tuple[float, ...]
    largest_means: tuple[float, ...]
    """Nats; the extreme mean dependencies of each minimum scope with more than one counted row."""
    target_maxima: tuple[float, ...]
    """beta_max of each mean scope: the scale that a row with the largest mean dependency of its minimum scope gets."""


def dependency_means(dependency_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Computes the mean dependency of each response, over all of its tokens, kept or not.

    Args:
        dependency_BT: [B, T] nats, finite.
        mask_BT: [B, T], 1 on response tokens.

    Returns:
        [B] nats in the dtype of the dependency; 0.0 for an empty response.
    """
    return (dependency_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1).to(dependency_BT.dtype)


def trajectory_scale(
    dependency_mean_B: Tensor,
    counted_B: Tensor,
    *,
    scale_min: float,
    scale_max: float | None = None,
    min_scope_B: Tensor | None = None,
    mean_scope_B: Tensor | None = None,
) -> TrajectoryScale:
    """Maps mean dependencies linearly to [scale_min, beta_max], with beta_max such that the mean scale is one.

    A row's mean dependency is first related to the smallest and largest of a set of rows, its minimum scope. Then
    beta_max is chosen so that the scales of another set, its mean scope, have the mean one. In the authors' code the
    first set is a device's mini-batch and the second a micro-batch, so that the result depends on the layout. By
    default both are all rows.

        relative = (mean - smallest) / (largest - smallest)               in [0, 1]
        beta_max = scale_min + (1 - scale_min) / mean of relative
        scale    = scale_min + relative (beta_max - scale_min)            mean 1

    A minimum scope with fewer than two counted rows, or whose means span at most 1e-6 nats, leaves its rows at scale
    one. A mean scope in which every row has the smallest mean gives them all scale_min, as the authors' code does. That
    cannot happen if both scopes are all rows.

    Args:
        dependency_mean_B: [B] nats.
        counted_B: [B] bool; the rows that take part. The others get scale 1.0 and enter no statistic.
        scale_min: beta_min, in (0, 1].
        scale_max: beta_max, if it is fixed; the mean scale is then not one.
        min_scope_B, mean_scope_B: [B] int64; equal numbers mark rows of one scope. None: all rows are one scope.
    """
    one_scope_B = torch.zeros_like(dependency_mean_B, dtype=torch.int64)
    min_scope_B = one_scope_B if min_scope_B is None else min_scope_B
    mean_scope_B = one_scope_B if mean_scope_B is None else mean_scope_B
    relative_B, spread_B = torch.zeros_like(dependency_mean_B), torch.zeros_like(counted_B)
    smallest_means, largest_means, target_maxima = [], [], []
    for scope in sorted(set(min_scope_B.tolist())):
        rows_B = counted_B & (min_scope_B == scope)
        if int(rows_B.sum()) < 2:
            continue
        low, high = dependency_mean_B[rows_B].min(), dependency_mean_B[rows_B].max()
        smallest_means.append(low.item())
        largest_means.append(high.item())
        if high - low > MIN_RANGE:
            relative_B[rows_B] = ((dependency_mean_B[rows_B] - low) / (high - low)).clamp(0.0, 1.0)
            spread_B |= rows_B
    scale_B = torch.ones_like(dependency_mean_B)
    for scope in sorted(set(mean_scope_B[spread_B].tolist())):
        rows_B = spread_B & (mean_scope_B == scope)
        target_max = scale_min + (1.0 - scale_min) / (relative_B[rows_B].mean() + MEAN_EPS)
        if scale_max is not None:
            target_max = torch.full_like(target_max, scale_max)
        target_maxima.append(target_max.item())
        scale_B[rows_B] = scale_min + relative_B[rows_B] * (target_max - scale_min)
    return TrajectoryScale(scale_B, tuple(smallest_means), tuple(largest_means), tuple(target_maxima))


def shape_advantages(advantage_B: Tensor, scale_B: Tensor, *, negative: NegativeAdvantages) -> Tensor:
    """Multiplies advantages by their scale.

    Args:
        advantage_B, scale_B: [B].
        negative: the factor of a negative advantage, given its scale alpha. 'same': alpha, as in the authors' code, so
            that a wrong response that depends on the image is punished harder. 'unscaled': 1. 'mirrored': 2 - alpha,
            but at least 0, so that no sign turns.
    """
    if negative == "same":
        return advantage_B * scale_B
    if negative == "unscaled":
        negative_scale_B = torch.ones_like(scale_B)
    elif negative == "mirrored":
        negative_scale_B = (2.0 - scale_B).clamp(min=0.0)
    else:
        raise ValueError(f"negative is {negative!r}; set it to 'same', 'unscaled' or 'mirrored'")
    return advantage_B * torch.where(advantage_B < 0, negative_scale_B, scale_B)
