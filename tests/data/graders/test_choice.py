"""Choice letters against readings by hand, and what is no choice."""

from __future__ import annotations

import pytest

from megatron_vppo.data.graders.choice import choice_in, grade
from megatron_vppo.data.graders.grade import Grade

BOXED = [
    (r"\boxed{B}", "B"),
    (r"\boxed{b}", "B"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{B.}", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\textbf{(C)}\ 5}", "C"),
    (r"\boxed{$\mathrm{D}$}", "D"),
    (r"\boxed{Option J}", "J"),
    (r"\boxed{B. Point C}", "B"),
    (r"\boxed{A} or rather \boxed{B}", "B"),
    (r"(A) \boxed{B}", "B"),
    (r"\boxed{K}", None),
    (r"\boxed{A or B}", None),
    (r"\boxed{(A) or (B)}", None),
    (r"\boxed{(A)(B)}", None),
    (r"\boxed{A, B}", None),
    (r"\boxed{A.}", "A"),
    (r"\boxed{ABD}", None),
    (r"\boxed{5 cm}", None),
    (r"(A) is right: \boxed{5 cm}", None),
]
UNBOXED = [
    ("Answer: B", "B"),
    ("**Answer:** (C), because D is wrong", "C"),
    ("The answer is **D**.", "D"),
    ("answer is option E", "E"),
    ("Answer: A\nlater, the answer is B", "B"),
    ("The answer is a square, that is (C)", "C"),
    ("either (B) or (C)", "C"),
    ("(B) fits, and D does not", "B"),
    ("I think that it is B", "B"),
    ("it is C. I am sure, and I'd say so", "C"),
    ("it is C. A square has four sides", "C"),
    ("Option A is right", "A"),
    ("the B-side, A_1 and \\C say nothing", None),
    ("b", None),
    ("Answer: b", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "letter"), BOXED + UNBOXED)
def test_the_letter_that_a_response_chose(response: str, letter: str | None) -> None:
    assert choice_in(response) == letter


@pytest.mark.parametrize("ground_truth", ["B", "(B)", r"\boxed{B}", "B. 5 cm"])
def test_grades(ground_truth: str) -> None:
    assert grade(r"\boxed{B}", ground_truth) == Grade(1.0, 1.0, {"answered": 1.0})
    assert grade(r"\boxed{C}", ground_truth) == Grade(0.0, 0.0, {"answered": 1.0})
    assert grade(r"\boxed{5}", ground_truth) == Grade(0.0, 0.0, {"answered": 0.0})


@pytest.mark.parametrize("ground_truth", ["5 cm", "ABD", "K", ""])
def test_a_data_set_without_choices_is_refused(ground_truth: str) -> None:
    with pytest.raises(ValueError, match=r"is no letter from A to J; reward\.reward_function=choice is for"):
        grade(r"\boxed{B}", ground_truth)
