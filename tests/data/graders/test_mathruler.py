"""The built-in reward against results of the authors' code: every row of the table, odd ones included."""

from __future__ import annotations

import pytest
from mathruler.grader import grade_answer

from megatron_vppo.data.graders.grade import Grade
from megatron_vppo.data.graders.mathruler import grade

GOLDEN = [
    (r"\boxed{4} then \boxed{5}", "5", 1),
    (r"\boxed{5} then \boxed{4}", "5", 0),
    ("the answer is 5", "5", 0),
    ("the answer is 5", "None", 1),
    (r"\boxed{\frac{1}{2}}", "0.5", 1),
    (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 0),
    (r"\boxed{10/2}", "5", 0),
    (r"\boxed{5.0}", "5", 1),
    (r"\boxed{\sqrt{4}}", "2", 0),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", 1),
    (r"\boxed{a}", "A", 1),
    (r"\boxed{A. foo}", "A", 0),
    (r"\boxed{(A)}", "A", 1),
    (r"\boxed{50\%}", "50", 1),
    (r"\boxed{3 cm}", "3", 1),
    (r"\boxed{x=5}", "5", 1),
    (r"\boxed{2x+1}", "1+2x", 1),
    (r"\boxed{\pi}", "3.14159", 0),
    (r"\boxed{1,234}", "1234", 1),
    (r"\boxed{5", "5", 0),
    (r"\boxed{5}", r"\boxed{5}", 1),
    (r"\boxed{}", "5", 0),
]


@pytest.mark.parametrize("response, ground_truth, reward", GOLDEN)
def test_golden_table(response: str, ground_truth: str, reward: int) -> None:
    assert grade(response, ground_truth) == Grade(reward=reward, accuracy=reward)


def test_spaces_around_signs_are_removed_before_the_box_is_read() -> None:
    """MathRuler alone does not see through the tabs: it finds these unequal."""
    response, ground_truth = "\\boxed{A\t<\tB}", "A<B"
    assert not grade_answer("A\t<\tB", ground_truth)
    assert grade(response, ground_truth).reward == 1.0
