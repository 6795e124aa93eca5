"""A reward that is a weighted sum of built-in graders, one of which decides on the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from megatron_vppo.config.choices import Grader
from megatron_vppo.data.graders.grade import Grade


@dataclass(frozen=True)
class BuiltInReward:
    """The graders of a run and their settings."""

    main: Grader
    """The one whose accuracy and details count."""
    weights: Mapping[Grader, float]
    """By grader, the main one among them."""
    relative_tolerance: float
    absolute_tolerance: float
    iou_threshold: float


def load_grader(name: Grader, reward: BuiltInReward) -> Callable[[str, str], Grade]:
    """Imports one grader, and what it needs of other packages, and gives it its settings."""
    match name:
        case "mathruler":
            from megatron_vppo.data.graders import mathruler

            return mathruler.grade
        case "math_verify":
            from megatron_vppo.data.graders import math_verify

            return math_verify.grade
        case "choice":
            from megatron_vppo.data.graders import choice

            return choice.grade
        case "number":
            from megatron_vppo.data.graders import number

            return partial(number.grade, relative=reward.relative_tolerance, absolute=reward.absolute_tolerance)
        case "iou":
            from megatron_vppo.data.graders import iou

            return partial(iou.grade, threshold=reward.iou_threshold)
        case "format":
            from megatron_vppo.data.graders import format

            return format.grade


def load_graders(reward: BuiltInReward) -> dict[Grader, Callable[[str, str], Grade]]:
    """Imports every grader that has a weight."""
    return {name: load_grader(name, reward) for name in reward.weights}


def weighted_sum(grades: Mapping[Grader, Grade], weights: Mapping[Grader, float], main: Grader) -> dict[str, float]:
    """Returns 'overall' = sum of weight * reward, the main grader's 'accuracy' and details, and each part's reward.

    A single part is not repeated under its own name.
    """
    parts: dict[str, float] = {name: grade.reward for name, grade in grades.items()} if len(grades) > 1 else {}
    overall = sum(weights[name] * grade.reward for name, grade in grades.items())
    return {**grades[main].details, **parts, "overall": overall, "accuracy": grades[main].accuracy}
