"""The places in a response where its final answer stands."""

from __future__ import annotations

import re

from mathruler.grader import extract_boxed_content

_NO_BOX = "None"  # MathRuler's word for a text without a closed box
_MARKER = re.compile(r"\banswer\b[*_\s]*(?:is|:|=)[*_\s:]*", re.IGNORECASE)


def tidied(response: str) -> str:
    """Removes the spaces around <, > and /, as the authors do before they look for tags and boxes."""
    return re.sub(r"\s*(<|>|/)\s*", r"\1", response)


def last_box(response: str) -> str | None:
    """Returns the content of the last `\\boxed{}`; None if there is none, or it is not closed."""
    content: str = extract_boxed_content(response)
    return None if content == _NO_BOX else content


def after_answer(response: str) -> str | None:
    """Returns the rest of the line after the last "answer:" or "answer is"; None if neither is there."""
    marks = list(_MARKER.finditer(response))
    return response[marks[-1].end() :].partition("\n")[0] if marks else None
