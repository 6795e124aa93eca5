"""The format that the authors' prompt asks for: `<think>...</think>`, then `\\boxed{...}`."""

from __future__ import annotations

from megatron_vppo.data.graders.answer_text import tidied
from megatron_vppo.data.graders.grade import Grade

_PIECES = ("</think>", "\\boxed{", "}")


def keeps_format(response: str) -> bool:
    """Returns True for a response that matches `<think>.*</think>.*\\\\boxed\\{.*\\}.*`, newlines included.

    That is the expression of EasyR1's format reward, after spaces around <, > and / are removed. Finding the pieces one
    after the other takes linear time; the expression takes the fourth power of the length for a hostile response.
    """
    text = tidied(response)
    start = "<think>"
    if not text.startswith(start):
        return False
    place = len(start)
    for piece in _PIECES:
        found = text.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return True


def grade(response: str, ground_truth: str) -> Grade:
    """Grades the format alone; the ground truth plays no part."""
    kept = float(keeps_format(response))
    return Grade(reward=kept, accuracy=kept)
