"""Grades of responses to benchmark questions, and the answers found in them, as votes of a majority.

Pure functions of texts. sympy may take forever over a hostile response, so callers run them in processes with a limit.

`mathruler` is PAPO-Eval's rule, and that of the authors' reward: spaces around <, > and / removed, then MathRuler's
`extract_boxed_content` and `grade_answer` (xhguo7/PAPO-Eval, eval_utils). `number` and `text` are those of
VLMEvalKit for DynaMath (its module dynamath), without its language model that looks for the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vppo.data.graders import choice, mathruler, number
from megatron_vppo.data.graders.answer_text import after_answer, last_box, tidied
from megatron_vppo.evaluation.question import GradingRule

_LETTERS = re.compile(r"[A-J]", re.IGNORECASE)
_BETWEEN_LETTERS = re.compile(r"(?:\s|[,;&/+()]|\band\b|\\text|[{}$.])+")
_PI = r"(?:\\pi(?![A-Za-z])|π)"
_FACTOR = r"(?P<factor>\d+(?:\.\d+)?)?\s*(?:\\cdot|\\times|[*·×])?\s*"
_FRACTION_TIMES_PI = re.compile(
    rf"\\[dt]?frac\s*\{{([^{{}}]*)\}}\s*\{{([^{{}}]*)\}}\s*(?:\\cdot|\\times|[*·×])?\s*{_PI}"
)
_MULTIPLE_OF_PI = re.compile(_FACTOR + _PI)
_DECORATION = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\b|\\[,;:! ]|[${}\s]")


@dataclass(frozen=True, slots=True)
class GradedSample:
    """One graded response to a question."""

    accuracy: float
    """1.0: right; 0.0: wrong."""
    vote: str | None
    """The answer found in the response, in the spelling that votes are counted by; None: no answer was found."""


def grade(response: str, answer: str, *, rule: GradingRule, options: Sequence[str] = ()) -> GradedSample:
    """Grades a response by the rule of its question.

    Args:
        answer: the ground truth.
        options: the texts of A, B, ...; under `choice`, a box with the text of one of them is its letter.

    Raises:
        ValueError: the rule does not take this answer.
    """
    try:
        accuracy = _accuracy(response, answer, rule, options)
    except ValueError as error:
        raise ValueError(
            f"the grader {rule.kind!r} does not take the answer {answer!r}; set another `grader`"
        ) from error
    return GradedSample(accuracy, _vote(response, rule, options))


def check_answer(answer: str, *, rule: GradingRule) -> None:
    """Raises ValueError for an answer that the rule does not take, without a call of sympy, which may hang."""
    if rule.kind in ("choice", "letters", "number", "iou"):
        grade("", answer, rule=rule)


def _accuracy(response: str, answer: str, rule: GradingRule, options: Sequence[str]) -> float:
    match rule.kind:
        case "mathruler":
            return mathruler.grade(response, answer).accuracy
        case "math_verify":
            from megatron_vppo.data.graders import math_verify  # a worker imports only what it grades by

            return math_verify.grade(response, answer).accuracy
        case "choice":
            return choice.grade(_with_letter(response, options), answer).accuracy
        case "letters":
            right = letters_of(answer)
            if right is None:
                raise ValueError(answer)
            return float(letters_in(response) == right)
        case "number":
            relative, absolute = rule.relative_tolerance, rule.absolute_tolerance
            return number.grade(
                pi_as_number(response), pi_as_number(answer), relative=relative, absolute=absolute
            ).accuracy
        case "text":
            return float(_plain(answer) in _plain(_answer_part(response)))
        case "iou":
            from megatron_vppo.data.graders import iou

            return iou.grade(response, answer, threshold=rule.iou_threshold).accuracy


def _vote(response: str, rule: GradingRule, options: Sequence[str]) -> str | None:
    match rule.kind:
        case "choice":
            return choice.choice_in(_with_letter(response, options))
        case "letters":
            return letters_in(response)
        case "number":
            found = number.quantity_in(pi_as_number(response))
            return None if found is None else _spelling(found)
        case "iou":
            from megatron_vppo.data.graders import iou

            boxes = iou.boxes_in(iou.answer_of(response))
            return str(boxes) if boxes else None
        case "mathruler":
            box = last_box(tidied(response))
        case "math_verify" | "text":
            box = _answer_part(response)
    return answer_spelling(box) if box is not None and box.strip() else None


def answer_spelling(answer: str) -> str:
    """Returns one spelling for answers that are plainly the same: 0.50 and 1/2, `5 cm` and `5cm`, B and (b)."""
    quantity = number.quantity_of(answer)
    if quantity is not None:
        return _spelling(quantity)
    return choice.letter_of(answer) or _plain(answer)


def _spelling(quantity: number.Quantity) -> str:
    return f"{quantity.value}{'%' if quantity.percent else ''}{quantity.unit}"


def _plain(text: str) -> str:
    return _DECORATION.sub("", text).casefold()


def _answer_part(response: str) -> str:
    """Returns the last box, else what follows "answer is", else the last line."""
    box = last_box(response)
    if box is not None:
        return box
    rest = after_answer(response)
    return rest if rest is not None else response.strip().rpartition("\n")[2]


# --- Choices ----------------------------------------------------------------------------------------------------------


def _with_letter(response: str, options: Sequence[str]) -> str:
    """Returns the box of an option's letter for a response whose box holds the text of that option alone."""
    box = last_box(response)
    if box is None or choice.letter_of(box) is not None or not _plain(box):
        return response
    same = [number for number, option in enumerate(options) if _plain(option) == _plain(box)]
    return f"\\boxed{{{chr(ord('A') + same[0])}}}" if len(same) == 1 else response


def letters_of(answer: str) -> str | None:
    """Returns the letters of an answer that consists of some, in the order of the alphabet: 'AC' for 'C, A' or 'AC'.

    None if it is anything else.
    """
    parts = _BETWEEN_LETTERS.sub("", answer)
    if not parts or not all(map(_LETTERS.fullmatch, parts)):
        return None
    return "".join(sorted(set(parts.upper())))


def letters_in(response: str) -> str | None:
    """Returns the letters in the last box, else those after "answer is"; None if there are none."""
    found = last_box(response)
    if found is None:
        found = after_answer(response)
    return None if found is None else letters_of(found)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def pi_as_number(text: str) -> str:
    """Writes multiples of π as decimals: `2π`, `\\frac{\\pi}{3}`, `\\frac{3}{4}\\pi`."""
    text = _FRACTION_TIMES_PI.sub(lambda match: f"\\frac{{{match[1]}\\pi}}{{{match[2]}}}", text)
    return _MULTIPLE_OF_PI.sub(lambda match: f"{float(match['factor'] or 1) * math.pi:.15g}", text)
