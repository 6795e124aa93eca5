"""The built-in reward function: is the last boxed answer right? It grades as the authors do, with MathRuler.

Imported by reward workers: nothing here may import torch.
"""

from __future__ import annotations

import re
from typing import TypedDict

from mathruler.grader import extract_boxed_content, grade_answer


class RewardInput(TypedDict):
    """The argument of a reward function for one response (EasyR1's convention)."""

    response: str
    """The text, without special tokens."""
    response_length: int
    """Tokens."""
    ground_truth: str
    """The answer of the data set row."""


def boxed_accuracy(response: str, ground_truth: str) -> float:
    """Returns 1.0 if MathRuler finds the content of the last `\\boxed{}` equal to the ground truth, else 0.0.

    A response without a closed box counts as the answer 'None'. Spaces around <, > and / are removed first, as the
    authors do.
    """
    tidied = re.sub(r"\s*(<|>|/)\s*", r"\1", response)
    return 1.0 if grade_answer(extract_boxed_content(tidied), ground_truth) else 0.0


def compute_score(reward_input: RewardInput) -> dict[str, float]:
    """Returns the reward 'mathruler', which is the accuracy alone, with no part for the format."""
    accuracy = boxed_accuracy(reward_input["response"], reward_input["ground_truth"])
    return {"overall": accuracy, "accuracy": accuracy}
