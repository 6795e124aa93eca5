"""Images shared out over ranks: each runs the vision tower on its own images, and all get the features of all.

Shape suffix legend: P = patches of this rank's images; D = values of one patch; M = merged vision features, of all
images or (`own`) of this rank's; O = outputs of the vision tower per merged feature: the embedding's, then deepstack's;
h = hidden size of the language model.

Three images with 4, 1 and 2 merged features on two ranks, `assign_images(...) == ((0,), (1, 2))`:

    rank 0 runs image 0:         0 0 0 0
    rank 1 runs images 1, 2:     1 2 2 .            padded to the rank with the most
    all ranks gather             0 0 0 0 1 2 2 .
    and reorder by image         0 0 0 0 1 2 2      here nothing moves but the padding goes
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vppo.models.vision.tower import Grid, TowerPlan, VisionFeatures, VisionTower
from megatron_vppo.models.vision.tower_run import KeptFeatures, TowerRun


@dataclass(frozen=True)
class VisionGroups:
    """The process groups that share the work of the vision tower."""

    tower: ProcessGroupCollection
    """The tensor-parallel ranks of the tower, which all run the same images."""
    images: dist.ProcessGroup
    """The ranks that share the images of a micro-batch."""
    gradients: dist.ProcessGroup
    """The ranks whose gradients of the features are summed: the context-parallel ranks, each of which has those of its
    own tokens. Ranks that are tensor-parallel in the language model all have the same."""


@functools.lru_cache(maxsize=256)
def assign_images(
    grids_thw: tuple[Grid, ...], *, ranks: int, held: tuple[int, ...] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Returns the numbers of each rank's images, rising.

    The largest image goes first, to the rank with the fewest patches.

    The result depends on the arguments alone, so ranks that hold the same micro-batch agree without a message.

    Args:
        held: the patches that each rank has already; None: none has any.
    """
    patches = [frames * rows * columns for frames, rows, columns in grids_thw]
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks if held is None else list(held)
    for image in sorted(range(len(patches)), key=lambda number: -patches[number]):
        rank = load.index(min(load))
        assigned[rank].append(image)
        load[rank] += patches[image]
    return tuple(tuple(sorted(images)) for images in assigned)


@dataclass(frozen=True)
class FeatureShares:
    """The way of the features of a run from the ranks that share its images, to all of these ranks."""

    rows: int
    """The features that each rank sends, padding included."""
    by_image_M: Tensor
    """int64; the place of each feature among those of all ranks, one rank after the other."""


@dataclass(frozen=True)
class ImageWork:
    """The images of a run that this rank takes, and the way of their features to the other ranks."""

    tower: TowerPlan | None
    """None: this rank has no image."""
    shares: FeatureShares | None
    """None: no other rank shares the images."""
    kept: KeptFeatures | None
    """See TowerRun."""

    @property
    def patches(self) -> int:
        """The patches that this rank runs the tower on."""
        return 0 if self.tower is None else sum(math.prod(grid) for grid in self.tower.grids_thw)


def plan_images(tower: VisionTower, run: TowerRun, *, rank: int, ranks: int) -> ImageWork:
    """Plans the work on the images of a run of the tower.

    Args:
        rank: this rank's number among the `ranks` that share the images.
    """
    images_of_ranks = run.images_of_ranks or (tuple(range(len(run.grids_thw))),)
    assert len(images_of_ranks) == ranks, "images are assigned to the ranks that share them"
    own_grids = tuple(run.grids_thw[image] for image in images_of_ranks[rank])
    shares = None
    if ranks > 1:
        counts = [_merged_counts(run.grids_thw, images, tower.merge) for images in images_of_ranks]
        shares = FeatureShares(max(sum(c) for c in counts), _rows_by_image(images_of_ranks, counts))
    return ImageWork(tower.plan(own_grids) if own_grids else None, shares, run.kept)


def split_pixels(works: Sequence[ImageWork], pixels_PD: Tensor) -> tuple[Tensor, ...]:
    """Cuts the patches of this rank into those of each run of the tower.

    Raises:
        ValueError: they are not those of this rank's images.
    """
    patches = [work.patches for work in works]
    if sum(patches) != len(pixels_PD):
        grids = [() if work.tower is None else work.tower.grids_thw for work in works]
        raise ValueError(f"the grids {grids} have {sum(patches)} patches but pixels hold {len(pixels_PD)}")
    parts = zip(works, pixels_PD.split(patches), strict=True)
    # Autograd holds the pixels of a kept run up to its last reader, and with a part of a tensor all of it.
    return tuple(own_PD.clone() if work.kept is not None and len(works) > 1 else own_PD for work, own_PD in parts)


def image_parallel_features(
    tower: VisionTower, work: ImageWork, pixels_PD: Tensor, *, groups: VisionGroups, width: int
) -> VisionFeatures:
    """Brings the features of all images of a run to every rank; the tower runs on this rank's images alone.

    Args:
        pixels_PD: patches of this rank's images, in the images' order; no rows where it has none.
        width: hidden size of the language model.
    """
    features = None if work.tower is None else tower(pixels_PD, work.tower)
    if work.shares is None:
        assert features is not None, "a rank that shares with no other has all images"
        return features
    if features is not None:
        own_MOh = torch.stack([features.merged_Mh, *features.deepstack_Mh], dim=1)
    else:
        own_MOh = pixels_PD.new_zeros(0, 1 + tower.num_taps, width, dtype=tower.dtype)
        # The gather's backward is a collective: a rank without images has to take part, so autograd must reach it here.
        own_MOh.requires_grad_(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters()))
    gathered_MOh = _GatherPadded.apply(own_MOh, work.shares.rows, groups)
    first, *taps = gathered_MOh[work.shares.by_image_M].unbind(1)
    return VisionFeatures(first, tuple(taps))


def _merged_counts(grids_thw: tuple[Grid, ...], images: tuple[int, ...], merge: int) -> list[int]:
    return [frames * rows * columns // merge**2 for frames, rows, columns in (grids_thw[image] for image in images)]


def _rows_by_image(images_of_ranks: tuple[tuple[int, ...], ...], counts: list[list[int]]) -> Tensor:
    """Returns int64 [M]: the rows of the gathered features, image after image.

    The gathered tensor holds the ranks one after the other, each padded to as many rows as the fullest has.
    """
    rows_per_rank = max(sum(c) for c in counts)
    rows_of_image: dict[int, Tensor] = {}
    for rank, images in enumerate(images_of_ranks):
        start = rank * rows_per_rank
        for image, count in zip(images, counts[rank], strict=True):
            rows_of_image[image] = torch.arange(start, start + count)
            start += count
    return torch.cat([rows_of_image[image] for image in sorted(rows_of_image)])


class _GatherPadded(torch.autograd.Function):
    """[M, O, h] of each rank, padded to `rows` -> [ranks * rows, O, h].

    Backward: the gradients of all features are summed over the context-parallel ranks, and each rank takes its own
    rows.
    """

    @staticmethod
    def forward(ctx: Any, own_MOh: Tensor, rows: int, groups: VisionGroups) -> Tensor:
        ctx.groups, ctx.start, ctx.count = groups, groups.images.rank() * rows, len(own_MOh)
        padded = own_MOh.new_zeros(rows, *own_MOh.shape[1:])
        padded[: len(own_MOh)] = own_MOh
        blocks = [torch.empty_like(padded) for _ in range(groups.images.size())]
        dist.all_gather(blocks, padded, group=groups.images)
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_MOh = grads[0].contiguous()
        if ctx.groups.gradients.size() > 1:
            dist.all_reduce(grad_MOh, group=ctx.groups.gradients)
        return grad_MOh[ctx.start : ctx.start + ctx.count], None, None
