"""The built-in reward: is the last boxed answer right? Exactly as the authors grade (spec 4.3), on MathRuler.

Imported by reward workers: nothing here may import torch.
"""

from __future__ import annotations

import re
from typing import TypedDict

from mathruler.grader import extract_boxed_content, grade_answer


class RewardInput(TypedDict):
    """What a reward function receives for one response (EasyR1's convention)."""

    response: str
    """Decoded without special tokens."""
    response_length: int
    """Tokens."""
    ground_truth: str


def boxed_accuracy(response: str, ground_truth: str) -> float:
    """1.0 where MathRuler finds the content of the last `\\boxed{}` equal to the ground truth, else 0.0.

    No closed box counts as the answer 'None'; spaces around <, > and / go first, as the authors remove them.
    """
    tidied = re.sub(r"\s*(<|>|/)\s*", r"\1", response)
    return 1.0 if grade_answer(extract_boxed_content(tidied), ground_truth) else 0.0


def compute_score(reward_input: RewardInput) -> dict[str, float]:
    """Reward 'mathruler': the accuracy is all of it; no part is for the format."""
    accuracy = boxed_accuracy(reward_input["response"], reward_input["ground_truth"])
    return {"overall": accuracy, "accuracy": accuracy}
