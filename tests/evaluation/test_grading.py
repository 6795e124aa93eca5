"""Grades and votes, against VLMEvalKit's rules for DynaMath, PAPO-Eval's three lines, and values worked out by hand."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest
from mathruler.grader import extract_boxed_content, grade_answer

from megatron_vppo.config.choices import Grading
from megatron_vppo.evaluation.grading import answer_spelling, check_answer, grade, letters_of
from megatron_vppo.evaluation.question import GradingRule

FLOAT = GradingRule("number", absolute_tolerance=0.001)


def rule(kind: Grading) -> GradingRule:
    return GradingRule(kind)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think> \\boxed{48}", "48"),
        ("\\boxed{ 1 / 2 }", "0.5"),
        ("\\boxed{1 < x}", "1<x"),
        ("\\boxed{A. 65}", "A"),
        ("\\boxed{A}", "A"),
        ("the answer is A", "A"),
        ("\\boxed{5", "5"),
        ("\\boxed{3} or \\boxed{4}", "4"),
        ("", "None"),
    ],
)
def test_mathruler_is_the_rule_of_papo_eval(response: str, answer: str) -> None:
    """PAPO-Eval's compute_accuracy_boxed_math, in its three steps."""
    tidy = re.sub(r"\s*(<|>|/)\s*", r"\1", response)
    expected = 1.0 if grade_answer(extract_boxed_content(tidy), answer) else 0.0
    assert grade(response, answer, rule=rule("mathruler")).accuracy == expected


@pytest.mark.parametrize(
    ("response", "answer", "accuracy"),
    [
        ("\\boxed{3.142}", "3.142", 1.0),
        ("\\boxed{3.1425}", "3.142", 1.0),
        ("\\boxed{3.1435}", "3.142", 0.0),
        ("\\boxed{π}", "3.142", 1.0),
        ("\\boxed{2\\pi}", "6.283", 1.0),
        ("\\boxed{2.5 \\cdot \\pi}", "7.854", 1.0),
        ("\\boxed{\\frac{\\pi}{3}}", "1.047", 1.0),
        ("\\boxed{\\frac{3}{4}\\pi}", "2.356", 1.0),
        ("\\boxed{-\\pi/2}", "-1.571", 1.0),
        ("\\boxed{3.142}", "π", 1.0),
        ("it is \\pi, so the answer is 3.14", "3.142", 0.0),
    ],
)
def test_numbers_within_a_thousandth_and_multiples_of_pi(response: str, answer: str, accuracy: float) -> None:
    assert grade(response, answer, rule=FLOAT).accuracy == accuracy


@pytest.mark.parametrize(
    ("response", "answer", "accuracy"),
    [
        ("\\boxed{The function is Even.}", "even", 1.0),
        ("\\boxed{odd}", "even", 0.0),
        ("It might be even.\nThe answer is odd", "even", 0.0),
        ("Let us see.\nIt is convex", "convex", 1.0),
        ("It is convex.\nNo, it is not.", "convex", 0.0),
        ("", "even", 0.0),
    ],
)
def test_texts_by_substring_of_the_final_answer(response: str, answer: str, accuracy: float) -> None:
    assert grade(response, answer, rule=rule("text")).accuracy == accuracy


@pytest.mark.parametrize(
    ("response", "answer", "accuracy", "vote"),
    [
        ("\\boxed{C, A}", "A, C", 1.0, "AC"),
        ("\\boxed{A \\text{ and } C}", "A, C", 1.0, "AC"),
        ("the answer is (A) and (C).", "A, C", 1.0, "AC"),
        ("\\boxed{A}", "A, C", 0.0, "A"),
        ("\\boxed{A, B, C}", "A, C", 0.0, "ABC"),
        ("\\boxed{none}", "A, C", 0.0, None),
        ("A and C, I think", "A, C", 0.0, None),
    ],
)
def test_several_letters(response: str, answer: str, accuracy: float, vote: str | None) -> None:
    found = grade(response, answer, rule=rule("letters"))
    assert (found.accuracy, found.vote) == (accuracy, vote)


def test_letters_of_an_answer() -> None:
    assert [letters_of(text) for text in ("B, D", "DB", "b", "3", "", "5 cm")] == ["BD", "BD", "B", None, None, None]


@pytest.mark.parametrize(
    ("response", "vote"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{60^{\\circ}}", "C"),
        ("\\boxed{\\text{No correct answer}}", "E"),
        ("\\boxed{50}", None),  # two options say so
        ("\\boxed{70}", None),
        ("", None),
    ],
)
def test_the_text_of_an_option_is_its_letter(response: str, vote: str | None) -> None:
    options = ("50", "50", "$60^{\\circ}$", "65", "No correct answer")
    found = grade(response, "C", rule=rule("choice"), options=options)
    assert found.vote == vote
    assert found.accuracy == float(vote == "C")


def test_votes_are_counted_in_one_spelling() -> None:
    same = [("0.50", "\\frac{1}{2}", "1/2"), ("5 cm", "5cm", "5 \\text{ cm}"), ("B", "(b)", "B. yes"), ("x + 1", "x+1")]
    assert [len({answer_spelling(text) for text in group}) for group in same] == [1, 1, 1, 1]
    assert len({answer_spelling(text) for text in ("5", "5%", "5 cm", "-5", "x")}) == 5
    assert grade("\\boxed{}", "5", rule=rule("mathruler")).vote is None
    assert grade("no box", "5", rule=rule("mathruler")).vote is None, "it answers nothing to that rule"
    assert grade("the answer is 5", "5", rule=rule("math_verify")).vote == "5"
    assert grade("\\boxed{[1, 2, 3, 4]}", "[1, 2, 3, 4]", rule=rule("iou")).vote == "[(1.0, 2.0, 3.0, 4.0)]"
    assert grade("\\boxed{2π}", "6.283", rule=FLOAT).vote == grade("\\boxed{2\\pi}", "6.283", rule=FLOAT).vote


@pytest.mark.parametrize(("kind", "answer"), [("choice", "5"), ("letters", "5"), ("number", "even"), ("iou", "A")])
def test_an_answer_that_the_rule_does_not_take(kind: Grading, answer: str) -> None:
    with pytest.raises(
        ValueError, match=f"the grader '{kind}' does not take the answer '{answer}'; set another `grader`"
    ):
        check_answer(answer, rule=rule(kind))


def test_a_rule_and_a_grade_go_to_other_processes() -> None:
    found = grade("\\boxed{5}", "5", rule=FLOAT)
    assert pickle.loads(pickle.dumps((FLOAT, found))) == (FLOAT, found)


def test_a_worker_that_grades_imports_little() -> None:
    """Each of the reward workers would take seconds and memory for these."""
    heavy = ("torch", "datasets", "transformers", "scipy", "PIL", "math_verify")
    code = f"import sys, megatron_vppo.evaluation.grading; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
