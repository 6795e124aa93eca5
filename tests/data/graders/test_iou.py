"""Overlaps of boxes against areas worked out by hand, and the places where boxes are found."""

from __future__ import annotations

import pytest

from megatron_vppo.data.graders.grade import Grade
from megatron_vppo.data.graders.iou import answer_of, boxes_in, grade, intersection_over_union, mean_overlap


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),  # 1 of 4 + 4 - 1
        ((0, 0, 4, 4), (1, 1, 3, 2), 1 / 8),  # inside: 2 of 16
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),  # side by side
        ((0, 0, 2, 2), (3, 3, 5, 5), 0.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),  # the wrong way round
        ((1, 0, 1, 2), (0, 0, 2, 2), 0.0),  # empty
    ],
)
def test_intersection_over_union(one, other, share: float) -> None:
    assert intersection_over_union(one, other) == intersection_over_union(other, one) == share


def test_boxes_are_paired_so_that_the_sum_is_largest() -> None:
    """In one dimension: [4, 14] shares 6 of 14 with [0, 10] and 4 of 16 with [10, 20]; [0, 4] shares 4 of 10 with the
    first. Taking the largest pair first gives 3/7, the best pairs give 1/4 + 2/5."""
    found, right = [(4.0, 0.0, 14.0, 1.0), (0.0, 0.0, 4.0, 1.0)], [(0.0, 0.0, 10.0, 1.0), (10.0, 0.0, 20.0, 1.0)]
    assert mean_overlap(found, right) == pytest.approx((1 / 4 + 2 / 5) / 2, abs=1e-12)
    assert mean_overlap(found[:1], right) == pytest.approx(3 / 7 / 2, abs=1e-12), "one is missing"
    assert mean_overlap(found, right[:1]) == pytest.approx(3 / 7 / 2, abs=1e-12), "one too many"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("(1,2,3.5,4)", [(1, 2, 3.5, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [-5, 6, 7, 8]}]', [(1, 2, 3, 4), (-5, 6, 7, 8)]),
        ("[[1,2,3,4],[5,6,7,8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("[1, 2, 3]", []),
        ("[1, 2, 3, 4, 5]", []),
        ("[1, 2, 3, x]", []),
    ],
)
def test_boxes_in_lists_and_json(text: str, boxes: list[tuple[float, ...]]) -> None:
    assert boxes_in(text) == boxes


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"[0,0,1,1] <answer>[1,1,2,2]</answer> \boxed{[2,2,3,3]}", "[2,2,3,3]"),
        ("[0,0,1,1] <answer>a</answer> <answer>[1,1,2,2]</answer>\n[3,3,4,4]", "[1,1,2,2]"),
        ('[0,0,1,1]\n```json\n[{"bbox_2d": [1,1,2,2]}]\n```\nDone.', '\n[{"bbox_2d": [1,1,2,2]}]\n'),
        ("First [0,0,1,1].\nThen [1,1,2,2] and [2,2,3,3].\nDone.", "Then [1,1,2,2] and [2,2,3,3]."),
        ("none", ""),
    ],
)
def test_the_part_of_a_response_with_its_answer(response: str, answer: str) -> None:
    assert answer_of(response) == answer


def test_right_from_the_threshold_on() -> None:
    quarter = r"\boxed{[0, 0, 1, 1]}"  # of [0, 0, 2, 2]
    assert grade(quarter, "[0, 0, 2, 2]", threshold=0.25) == Grade(0.25, 1.0, {"answered": 1.0})
    assert grade(quarter, "[0, 0, 2, 2]", threshold=0.2501) == Grade(0.25, 0.0, {"answered": 1.0})
    assert grade("none", "[0, 0, 2, 2]", threshold=0.25) == Grade(0.0, 0.0, {"answered": 0.0})


@pytest.mark.parametrize("ground_truth", ["5", "[2, 2, 0, 0]", "[0, 0, 1, 0]"])
def test_a_data_set_without_boxes_is_refused(ground_truth: str) -> None:
    with pytest.raises(ValueError, match=r"holds no box .* reward\.reward_function=iou is for"):
        grade("[0, 0, 1, 1]", ground_truth, threshold=0.5)
