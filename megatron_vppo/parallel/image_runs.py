"""The runs of the vision tower in a phase: the images that it takes in each micro-batch, and who else reads them.

A group that does not fit into a micro-batch is cut, so neighbours show the same images. The tower runs on an image in
the first of them, and the others read its features (`megatron_vppo/models/vision/tower_run.py`):

    micro-batch      shows      runs the tower on      reads of earlier runs
    0                a          a
    1                a b        b                      a
    2                b                                 b
    3                a          a

An image that comes again after a gap has another run. Up to its last reader a run keeps what its backward pass needs;
so no micro-batch has to hold more than that of the images that it shows. Ranks that share images take about equally
many patches of all that a micro-batch shows, whatever runs they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Response
from megatron_vppo.models.vision.image_parallel import assign_images
from megatron_vppo.models.vision.tower import Grid
from megatron_vppo.models.vision.tower_run import KeptFeatures, TowerRun
from megatron_vppo.parallel.batching import View

ShownImage = tuple[ImageRef, PerturbKey | None]
"""An image as a view shows it."""


@dataclass(frozen=True)
class ImageRun:
    """Images that go through the tower together, since they are read by the same micro-batches."""

    images: tuple[ShownImage, ...]
    grids_thw: tuple[Grid, ...]
    numbers_of_ranks: tuple[tuple[int, ...], ...]
    """The numbers of the images that each rank takes of those that share them."""
    kept: KeptFeatures | None
    """None: they are read in the micro-batch of the run alone."""

    def of_rank(self, rank: int) -> list[ShownImage]:
        return [self.images[number] for number in self.numbers_of_ranks[rank]]

    def of_tower(self) -> TowerRun:
        return TowerRun(self.grids_thw, self.numbers_of_ranks, self.kept)


@dataclass(frozen=True)
class ImageRuns:
    """The runs whose features a micro-batch reads. Its merged features are numbered in this order."""

    earlier: tuple[ImageRun, ...]
    """Those of micro-batches before it."""
    own: tuple[ImageRun, ...]

    def features(self, *, merge_size: int) -> dict[ShownImage, range]:
        """Returns the numbers of each image's merged features.

        Args:
            merge_size: patches along one side of a merged feature.
        """
        numbers: dict[ShownImage, range] = {}
        end = 0
        for run in (*self.earlier, *self.own):
            for image, grid in zip(run.images, run.grids_thw, strict=True):
                first, end = end, end + math.prod(grid) // merge_size**2
                numbers[image] = range(first, end)
        return numbers


@dataclass(frozen=True)
class Showing:
    """The views of a micro-batch, and the runs of the tower that their images come from."""

    views: Sequence[View]
    runs: ImageRuns | None = None
    """None: those of its own, which no other micro-batch reads."""

    @property
    def reads_several_runs(self) -> bool:
        return self.runs is not None and len(self.runs.earlier) + len(self.runs.own) > 1


def runs_of(responses: Sequence[Response], views: Sequence[View], *, ranks: int) -> ImageRuns:
    """Plans the runs for a micro-batch whose images no other one shows.

    Args:
        ranks: the number of ranks that share images.
    """
    (only,) = showings(responses, [views], ranks=ranks)
    assert only.runs is not None
    return only.runs


def showings(responses: Sequence[Response], micro_views: Sequence[Sequence[View]], *, ranks: int) -> list[Showing]:
    """Plans the runs of the tower for micro-batches that follow each other in a phase.

    Args:
        ranks: the number of ranks that share images.
    """
    shown = [_images_of(responses, views) for views in micro_views]
    earlier: list[list[ImageRun]] = [[] for _ in shown]
    own: list[list[ImageRun]] = [[] for _ in shown]
    for number, grids in enumerate(shown):
        new = [image for image in grids if number == 0 or image not in shown[number - 1]]
        rank_of = _rank_of({image: grids[image] for image in new}, earlier[number], ranks=ranks)
        read_until: dict[int, list[ShownImage]] = {}
        for image in new:
            read_until.setdefault(_last_reader(shown, number, image), []).append(image)
        for last, images in read_until.items():
            run = ImageRun(
                tuple(images),
                tuple(grids[image] for image in images),
                tuple(tuple(n for n, image in enumerate(images) if rank_of[image] == rank) for rank in range(ranks)),
                KeptFeatures(last - number + 1) if last > number else None,
            )
            own[number].append(run)
            for reader in range(number + 1, last + 1):
                earlier[reader].append(run)
    return [
        Showing(views, ImageRuns(tuple(before), tuple(now)))
        for views, before, now in zip(micro_views, earlier, own, strict=True)
    ]


def _images_of(responses: Sequence[Response], views: Sequence[View]) -> dict[ShownImage, Grid]:
    """Returns the distinct images of a micro-batch and their grids, in the order of the views."""
    prompts = [(responses[view.row].prompt, view.perturb) for view in views]
    return {
        (image, perturb): grid
        for prompt, perturb in prompts
        for image, grid in zip(prompt.images, prompt.grids_thw, strict=True)
    }


def _rank_of(grids: dict[ShownImage, Grid], earlier: Sequence[ImageRun], *, ranks: int) -> dict[ShownImage, int]:
    """Assigns the new images of a micro-batch, to ranks that hold the patches of the earlier ones that it reads."""
    held = tuple(
        sum(math.prod(run.grids_thw[number]) for run in earlier for number in run.numbers_of_ranks[rank])
        for rank in range(ranks)
    )
    images = list(grids)
    assigned = assign_images(tuple(grids.values()), ranks=ranks, held=held)
    return {images[number]: rank for rank, numbers in enumerate(assigned) for number in numbers}


def _last_reader(shown: Sequence[dict[ShownImage, Grid]], first: int, image: ShownImage) -> int:
    """Returns the last of the micro-batches from `first` on that show the image without a gap."""
    last = first
    while last + 1 < len(shown) and image in shown[last + 1]:
        last += 1
    return last
