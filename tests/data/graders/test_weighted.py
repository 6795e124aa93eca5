"""Weighted sums worked out by hand, and every grader found by its name with its settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vppo.config.choices import GRADERS
from megatron_vppo.data.graders.grade import Grade
from megatron_vppo.data.graders.weighted import BuiltInReward, load_graders, weighted_sum

EVERY = BuiltInReward("number", dict.fromkeys(GRADERS, 1.0), 1 / 64, 0.25, 0.25)


def test_a_sum_has_the_accuracy_and_details_of_its_main_part() -> None:
    grades = {"iou": Grade(0.5, 0.0, {"answered": 1.0}), "format": Grade(0.25, 1.0, {"other": 1.0})}
    assert weighted_sum(grades, {"iou": 0.75, "format": 0.5}, "iou") == {
        "overall": 0.5, "accuracy": 0.0, "iou": 0.5, "format": 0.25, "answered": 1.0
    }  # fmt: skip


def test_a_single_part_has_its_weight_and_no_metric_of_its_own() -> None:
    assert weighted_sum({"iou": Grade(0.5, 0.0)}, {"iou": 1.0}, "iou") == {"overall": 0.5, "accuracy": 0.0}


@pytest.mark.parametrize(
    ("name", "response", "ground_truth", "edge"),
    [
        ("mathruler", r"\boxed{5.0}", "5", None),
        ("math_verify", r"\boxed{10/2}", "5", None),
        ("choice", r"\boxed{B}", "B", None),
        ("number", r"\boxed{65}", "64", {"relative_tolerance": 0.0}),
        ("number", r"\boxed{0.25}", "0", {"absolute_tolerance": 0.0}),
        ("iou", "[0, 0, 1, 1]", "[0, 0, 2, 2]", {"iou_threshold": 0.5}),
        ("format", r"<think></think>\boxed{}", "5", None),
    ],
)
def test_every_grader_is_the_one_of_its_name(name, response: str, ground_truth: str, edge) -> None:
    """The response is right by this grader alone, and no longer with the setting that `edge` takes away."""
    assert load_graders(EVERY)[name](response, ground_truth).accuracy == 1.0
    if edge is not None:
        assert load_graders(replace(EVERY, **edge))[name](response, ground_truth).accuracy == 0.0


def test_only_graders_with_a_weight_are_loaded() -> None:
    assert list(load_graders(replace(EVERY, weights={"choice": 0.9, "format": 0.1}))) == ["choice", "format"]


@pytest.mark.parametrize(
    ("name", "response", "inside"),
    [
        ("mathruler", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("math_verify", r"\boxed{0.5}", r"\frac{1}{2}"),
        ("choice", "The answer is B", "B"),
        ("number", r"\boxed{64}", "64"),
        ("iou", "[0, 0, 1, 1]", "[0, 0, 1, 1]"),
    ],
)
def test_an_answer_of_the_data_set_in_a_box_is_what_the_box_holds(name, response: str, inside: str) -> None:
    """ViRL39K has them."""
    grader = load_graders(EVERY)[name]
    assert grader(response, f"\\boxed{{{inside}}}") == grader(response, inside)
    assert grader(response, inside).accuracy == 1.0
