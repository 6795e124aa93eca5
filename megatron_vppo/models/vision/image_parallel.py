"""Whole pictures dealt to ranks: each runs the vision tower on its own, and all get the features of all.

Shape suffix legend: P = patches of this rank's pictures; M = merged features of all pictures; O = those of this rank's;
S = feature tensors per picture (those that replace embeddings, then deepstack's); h = width of the language model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vppo.models.vision.tower import Grid, VisionFeatures, VisionTower


@dataclass(frozen=True)
class VisionGroups:
    """Who shares the work of the vision tower."""

    tower: ProcessGroupCollection
    """Its tensor-parallel ranks, which all run the same pictures."""
    images: dist.ProcessGroup
    """Ranks among which pictures are dealt."""
    gradients: dist.ProcessGroup
    """The context-parallel ranks, each of which has the gradient of its own tokens' features. Ranks that are
    tensor-parallel in the language model have the same gradient each."""


@functools.lru_cache(maxsize=256)
def assign_images(grids_thw: tuple[Grid, ...], *, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of the pictures of each rank, rising. The largest goes first, to the rank with the fewest patches."""
    patches = [frames * rows * columns for frames, rows, columns in grids_thw]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for picture in sorted(range(len(patches)), key=lambda number: -patches[number]):
        rank = load.index(min(load))
        dealt[rank].append(picture)
        load[rank] += patches[picture]
    return tuple(tuple(sorted(pictures)) for pictures in dealt)


def image_parallel_features(
    tower: VisionTower, pixels_PD: Tensor, grids_thw: tuple[Grid, ...], *, groups: VisionGroups, width: int
) -> VisionFeatures:
    """Features of all pictures on every rank; the tower runs on this rank's pictures alone.

    Args:
        pixels_PD: patches of this rank's pictures (see assign_images), in their order; none where it has none.
        grids_thw: of all pictures.
        width: of the features.

    Raises:
        ValueError: the pixels are not those of this rank's pictures.
    """
    ranks = groups.images.size()
    dealt = assign_images(grids_thw, ranks=ranks)
    mine = dealt[groups.images.rank()]
    own_grids = tuple(grids_thw[picture] for picture in mine)
    patches = sum(frames * rows * columns for frames, rows, columns in own_grids)
    if patches != len(pixels_PD):
        raise ValueError(f"the grids {own_grids} have {patches} patches but pixels hold {len(pixels_PD)}")
    if ranks == 1:
        return tower(pixels_PD, own_grids)
    if mine:
        features = tower(pixels_PD, own_grids)
        own_OSh = torch.stack([features.merged_Mh, *features.deepstack_Mh], dim=1)
    else:
        own_OSh = pixels_PD.new_zeros(0, 1 + tower.num_taps, width, dtype=tower.dtype)
        # The ranks with pictures wait for this one in the backward pass.
        own_OSh.requires_grad_(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters()))
    counts = [_merged_counts(grids_thw, pictures, tower.merge) for pictures in dealt]
    gathered_MSh = _Gathered.apply(own_OSh, max(sum(c) for c in counts), groups)
    first, *taps = gathered_MSh[_order(dealt, counts).to(gathered_MSh.device)].unbind(1)
    return VisionFeatures(first, tuple(taps))


def _merged_counts(grids_thw: tuple[Grid, ...], pictures: tuple[int, ...], merge: int) -> list[int]:
    return [frames * rows * columns // merge**2 for frames, rows, columns in (grids_thw[p] for p in pictures)]


def _order(dealt: tuple[tuple[int, ...], ...], counts: list[list[int]]) -> Tensor:
    """Rows of the gathered tensor, which holds the ranks one after the other, padded alike: picture after picture."""
    rows_per_rank = max(sum(c) for c in counts)
    where: dict[int, Tensor] = {}
    for rank, pictures in enumerate(dealt):
        start = rank * rows_per_rank
        for picture, count in zip(pictures, counts[rank], strict=True):
            where[picture] = torch.arange(start, start + count)
            start += count
    return torch.cat([where[picture] for picture in sorted(where)])


class _Gathered(torch.autograd.Function):
    """[O, S, h] of each rank -> [ranks * rows, S, h]; back: this rank's part of the sum over context-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, own_OSh: Tensor, rows: int, groups: VisionGroups) -> Tensor:
        ctx.groups, ctx.start, ctx.count = groups, groups.images.rank() * rows, len(own_OSh)
        padded = own_OSh.new_zeros(rows, *own_OSh.shape[1:])
        padded[: len(own_OSh)] = own_OSh
        parts = [torch.empty_like(padded) for _ in range(groups.images.size())]
        dist.all_gather(parts, padded, group=groups.images)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_MSh = grads[0].contiguous()
        if ctx.groups.gradients.size() > 1:
            dist.all_reduce(grad_MSh, group=ctx.groups.gradients)
        return grad_MSh[ctx.start : ctx.start + ctx.count], None, None
