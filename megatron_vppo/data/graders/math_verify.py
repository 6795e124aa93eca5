"""The grader of Hugging Face's Math-Verify: is the answer equal to the ground truth as an expression?"""

from __future__ import annotations

import logging

from math_verify import parse, verify

from megatron_vppo.data.graders.answer_text import last_box
from megatron_vppo.data.graders.grade import Grade, verdict

# It warns that its time limits are off. They are signals; the pool has a limit of its own, which ends the worker.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def grade(response: str, ground_truth: str) -> Grade:
    """Grades the content of the last `\\boxed{}`; without one, what Math-Verify takes for the answer in the text.

    Raises:
        ValueError: Math-Verify cannot read the ground truth.
    """
    truth = last_box(ground_truth)
    gold = parse(_boxed(ground_truth if truth is None else truth), parsing_timeout=None)
    if not gold:
        raise ValueError(f"Math-Verify cannot read the answer {ground_truth!r}; use another reward.reward_function")
    box = last_box(response)
    target = parse(response if box is None else _boxed(box), parsing_timeout=None)
    return verdict(bool(target) and verify(gold, target, timeout_seconds=None), answered=bool(target))


def _boxed(content: str) -> str:
    return f"\\boxed{{{content}}}"
