"""The grader of the authors: is the last boxed answer right, by MathRuler?"""

from __future__ import annotations

from mathruler.grader import extract_boxed_content, grade_answer

from megatron_vppo.data.graders.answer_text import tidied
from megatron_vppo.data.graders.grade import Grade


def boxed_accuracy(response: str, ground_truth: str) -> float:
    """Returns 1.0 if MathRuler finds the content of the last `\\boxed{}` equal to the ground truth, else 0.0.

    A response without a closed box counts as the answer 'None'. Spaces around <, > and / are removed first, as the
    authors do.
    """
    return 1.0 if grade_answer(extract_boxed_content(tidied(response)), ground_truth) else 0.0


def grade(response: str, ground_truth: str) -> Grade:
    """Grades by the accuracy alone, with no part for the format."""
    accuracy = boxed_accuracy(response, ground_truth)
    return Grade(reward=accuracy, accuracy=accuracy)
