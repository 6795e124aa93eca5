"""The grader of boxes: how much do those of the response overlap with the right ones?

A box is [x1, y1, x2, y2] in any unit, the same in response and ground truth, with x1 < x2 and y1 < y2.
"""

from __future__ import annotations

import re

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_vppo.data.graders.answer_text import last_box
from megatron_vppo.data.graders.grade import Grade

Box = tuple[float, float, float, float]

_NUMBER = r"\s*([-+]?\d{1,12}(?:\.\d{1,12})?)\s*"
_BOX = re.compile(r"[\[(]" + ",".join([_NUMBER] * 4) + r"[\])]")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)


def boxes_in(text: str) -> list[Box]:
    """Returns every list of four numbers in a text, those inside of JSON such as {"bbox_2d": [1, 2, 3, 4]} as well."""
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in _BOX.findall(text)]


def answer_of(response: str) -> str:
    """Returns the part of a response that holds its answer.

    It is the content of the last `\\boxed{}`, else of the last <answer> tag, else of the last fenced block, else the
    last line that holds a box.
    """
    if (box := last_box(response)) is not None:
        return box
    for kind in (_TAGGED, _FENCED):
        if found := kind.findall(response):
            return str(found[-1])
    return next((line for line in reversed(response.splitlines()) if _BOX.search(line)), "")


def intersection_over_union(one: Box, other: Box) -> float:
    """Returns the area of the intersection over that of the union; 0 where a box is empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (one, other)]
    if width <= 0 or height <= 0 or 0.0 in areas:
        return 0.0
    shared = width * height
    return shared / (sum(areas) - shared)


def mean_overlap(found: list[Box], right: list[Box]) -> float:
    """Returns the sum of the overlaps over the number of boxes on the side that has more.

    Each box is paired with at most one of the other side, so that the sum is the largest possible: a missing box and
    one too many both count as 0.
    """
    overlaps = np.array([[intersection_over_union(one, other) for other in right] for one in found])
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[rows, columns].sum()) / max(len(found), len(right))


def grade(response: str, ground_truth: str, *, threshold: float) -> Grade:
    """Grades by the overlap. A response is right if it reaches the threshold.

    Raises:
        ValueError: the ground truth holds no box, or an empty one.
    """
    right = boxes_in(ground_truth)
    if not right or any(x1 >= x2 or y1 >= y2 for x1, y1, x2, y2 in right):
        raise ValueError(
            f"the answer {ground_truth!r} holds no box [x1, y1, x2, y2] with x1 < x2 and y1 < y2; "
            "reward.reward_function=iou is for data sets whose answers are such boxes"
        )
    found = boxes_in(answer_of(response))
    overlap = mean_overlap(found, right) if found else 0.0
    return Grade(reward=overlap, accuracy=float(overlap >= threshold), details={"answered": float(bool(found))})
