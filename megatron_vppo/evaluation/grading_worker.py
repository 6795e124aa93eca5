"""Grades by the rule of each question, in the reward workers: `RewardPool` ends one that takes too long."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from megatron_vppo.data.reward_worker import ModuleReward
from megatron_vppo.evaluation.grading import grade
from megatron_vppo.evaluation.question import GradingRule, Question


def ground_truth_of(question: Question) -> str:
    """Returns, as the ground truth that goes to a worker, the answer with all that is needed to grade by it."""
    return json.dumps({"answer": question.answer, "options": question.options, "rule": asdict(question.rule)})


def grade_response(response: str, ground_truth: str) -> dict[str, Any]:
    """Grades a response in a worker.

    Args:
        ground_truth: what `ground_truth_of` returned.

    Raises as `grade` does.
    """
    fields = json.loads(ground_truth)
    graded = grade(response, fields["answer"], rule=GradingRule(**fields["rule"]), options=fields["options"])
    return {"overall": graded.accuracy, "accuracy": graded.accuracy, "vote": graded.vote}


QUESTION_REWARD = ModuleReward(grade_response.__module__, grade_response.__name__)
