"""The runs of the tower, by hand: the example of image_runs.py, with a perturbed view more."""

from __future__ import annotations

import torch

from megatron_vppo.algorithm.types import ImageRef, PerturbKey
from megatron_vppo.models.vision.tower import VisionFeatures
from megatron_vppo.parallel.batching import View
from megatron_vppo.parallel.image_runs import ImageRun, runs_of, showings
from tests.parallel.responses import LARGE, SMALL, respond

A, B = ImageRef("train", 0, 0), ImageRef("train", 1, 0)
RESPONSES = (respond([9, 9], [1], images=[0]), respond([9, 9, 9, 9], [1], images=[1]), respond([5], [1]))
"""They show a, b and nothing."""
HIDDEN = PerturbKey(1, 0)


def images_of(runs: tuple[ImageRun, ...]) -> list[list[ImageRef]]:
    return [[image for image, _ in run.images] for run in runs]


def test_neighbours_read_the_run_of_the_first_and_a_gap_ends_it() -> None:
    a, b, text = (View(row, None) for row in range(3))
    made = [showing.runs for showing in showings(RESPONSES, [[a, text], [b, a], [b], [a]], ranks=1)]
    assert [images_of(runs.own) for runs in made if runs] == [[[A]], [[B]], [], [[A]]]
    assert [images_of(runs.earlier) for runs in made if runs] == [[], [[A]], [[B]], []]
    first, second, third, fourth = made
    assert first and second and third and fourth
    assert second.earlier == first.own and third.earlier == second.own
    assert first.own[0].grids_thw == (SMALL,) and second.own[0].grids_thw == (LARGE,)
    assert first.own[0].kept and second.own[0].kept and fourth.own[0].kept is None


def test_images_with_other_readers_have_runs_of_their_own() -> None:
    """A perturbed image is another one, and is not kept with the one that goes on."""
    views = [[View(0, None), View(1, None), View(0, HIDDEN)], [View(0, None)]]
    first, second = (showing.runs for showing in showings(RESPONSES, views, ranks=1))
    assert first and second
    assert [run.images for run in first.own] == [((A, None),), ((B, None), (A, HIDDEN))]
    assert first.own[0].kept and first.own[1].kept is None
    assert second.own == () and second.earlier == first.own[:1]


def test_an_image_is_read_as_often_as_neighbours_show_it() -> None:
    (first, *_) = showings(RESPONSES, [[View(0, None), View(0, None)]] * 3, ranks=1)
    assert first.runs and first.runs.own[0].kept
    kept = first.runs.own[0].kept
    weight = torch.ones(2, 1, requires_grad=True)
    kept.put(VisionFeatures(weight * 2))
    reached = []
    for _ in range(3):
        kept.read().merged_Mh.sum().backward()
        reached.append(weight.grad is not None)
    assert reached == [False, False, True]


def test_a_micro_batch_alone() -> None:
    assert runs_of(RESPONSES, [View(2, None)], ranks=1).own == ()
    assert runs_of(RESPONSES, [View(0, None), View(0, HIDDEN)], ranks=1).own == (
        ImageRun(((A, None), (A, HIDDEN)), (SMALL, SMALL), ((0, 1),), None),
    )


def test_ranks_take_equal_parts_of_all_that_a_micro_batch_shows() -> None:
    """Whatever runs it reads: two of its own, or one of the micro-batch before that the first rank has taken."""
    a, b, hidden = View(0, None), View(1, None), View(0, HIDDEN)
    of_two, _ = (showing.runs for showing in showings(RESPONSES, [[a, hidden], [a]], ranks=2))
    assert of_two and [run.of_tower().images_of_ranks for run in of_two.own] == [((0,), ()), ((), (0,))]
    assert [run.of_rank(1) for run in of_two.own] == [[], [(A, HIDDEN)]]
    first, second, _ = (showing.runs for showing in showings(RESPONSES, [[b], [a, b, hidden], [a]], ranks=2))
    assert first and [run.of_tower().images_of_ranks for run in first.own] == [((0,), ())]
    assert second and [run.images for run in second.own] == [((A, None),), ((A, HIDDEN),)]
    assert [run.of_tower().images_of_ranks for run in second.own] == [((), (0,)), ((), (0,))]
