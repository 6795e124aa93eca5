"""Math-Verify on answers whose equality is plain, boxed and not, and what it cannot read."""

from __future__ import annotations

import logging

import math_verify
import pytest

from megatron_vppo.data.graders.grade import Grade
from megatron_vppo.data.graders.math_verify import grade

RIGHT, WRONG, NOTHING = (Grade(r, r, {"answered": a}) for r, a in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0)))


@pytest.mark.parametrize(
    ("response", "ground_truth", "expected"),
    [
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", RIGHT),
        (r"\boxed{\frac{2}{4}}", r"\boxed{\frac{1}{2}}", RIGHT),
        (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", RIGHT),
        (r"\boxed{10/2}", "5", RIGHT),
        (r"\boxed{4} then \boxed{5}", "5", RIGHT),
        (r"\boxed{5} then \boxed{4}", "5", WRONG),
        ("the answer is 5", "5", RIGHT),
        (r"\boxed{}, which is 5", "5", NOTHING),
        ("no idea", "5", NOTHING),
    ],
)
def test_grades(response: str, ground_truth: str, expected: Grade) -> None:
    assert grade(response, ground_truth) == expected


def test_a_ground_truth_that_it_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Math-Verify cannot read the answer ''; use another reward\.reward_function"):
        grade(r"\boxed{5}", "")


def test_it_does_not_say_that_its_time_limits_are_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so once per process. The limits are signals; the pool ends a worker that is late."""
    for module in (math_verify.parser, math_verify.grader):
        monkeypatch.setattr(module, "TIMEOUT_WARNING_SHOWN", False)
    caplog.set_level(logging.DEBUG)
    grade(r"\boxed{5}", "5")
    assert caplog.text == ""
