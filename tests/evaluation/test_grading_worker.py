"""The rule of a question, on its way to a worker and back as a reward."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vppo.evaluation.grading_worker import grade_response, ground_truth_of
from megatron_vppo.evaluation.question import GradingRule
from tests.evaluation.questions import question


@pytest.mark.parametrize(
    ("rule", "options", "answer", "response", "accuracy", "vote"),
    [
        (GradingRule("mathruler"), (), "1", "\\boxed{1}", 1.0, "1"),
        (GradingRule("number", relative_tolerance=0.1), (), "100", "\\boxed{109}", 1.0, "109"),
        (GradingRule("number", relative_tolerance=0.01), (), "100", "\\boxed{109}", 0.0, "109"),
        (GradingRule("choice"), ("red", "blue"), "B", "\\boxed{blue}", 1.0, "B"),
        (GradingRule("choice"), ("blue", "red"), "B", "\\boxed{blue}", 0.0, "A"),
        (GradingRule("mathruler"), (), "1", "no box", 0.0, None),
    ],
)
def test_rule_options_and_answer_arrive(
    rule: GradingRule, options: tuple[str, ...], answer: str, response: str, accuracy: float, vote: str | None
) -> None:
    asked = replace(question("q"), rule=rule, options=options, answer=answer)
    assert grade_response(response, ground_truth_of(asked)) == {
        "overall": accuracy, "accuracy": accuracy, "vote": vote,
    }  # fmt: skip
