"""The grader of multiple choice: which of the letters A to J did the response choose?"""

from __future__ import annotations

import re

from megatron_vppo.data.graders.answer_text import after_answer, last_box
from megatron_vppo.data.graders.grade import Grade, verdict

_MARKUP = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|bf|rm)\b|\\[()\[\],;! ]|[{}$*`\"~]")
_ALONE = re.compile(r"(?:(?:option|choice)\s*)?\(?([A-J])\)?[.:]?", re.IGNORECASE)
_LABEL = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)])(?!\s*(?:or\b|and\b|[,/&(]))\s*\S")
_IN_BRACKETS = re.compile(r"\(([A-J])\)")
# Neither the article ("A square ...") nor the pronoun ("I think ...") is a choice.
_LETTER = r"(?!A\s+(?!is\b|are\b)[a-z])(?!I\s+(?!is\b)[a-z])([A-J])(?![\w'\u2019]|-\w)"
_STAND_ALONE = re.compile(rf"(?<![\w'\u2019\\-]){_LETTER}")
_FIRST = re.compile(rf"\W*(?:(?:option|choice)\s+)?\W*{_LETTER}", re.IGNORECASE)


def letter_of(answer: str) -> str | None:
    """Returns the letter that an answer consists of or begins with: 'B', '(b)', 'Option B', 'B. 5 cm'.

    None if it is anything else, such as '5 cm' or 'A or B'.
    """
    plain = _MARKUP.sub("", answer).strip()
    if alone := _ALONE.fullmatch(plain):
        return alone[1].upper()
    label = _LABEL.match(plain)
    return label and (label[1] or label[2])


def choice_in(response: str) -> str | None:
    """Returns the letter that a response chose; None if it chose none.

    It is that of the last `\\boxed{}`. Without a box: after the last "answer:" or "answer is", else the last letter in
    brackets, else the last capital letter that stands alone.
    """
    box = last_box(response)
    if box is not None:
        return letter_of(box)
    plain = _MARKUP.sub("", response)
    rest = after_answer(plain)
    if rest is not None and (first := _FIRST.match(rest)) and first[1].isupper():
        return first[1]
    found: list[str] = _IN_BRACKETS.findall(plain) or _STAND_ALONE.findall(plain)
    return found[-1] if found else None


def grade(response: str, ground_truth: str) -> Grade:
    """Grades the chosen letter.

    Raises:
        ValueError: the ground truth is no letter from A to J.
    """
    truth = last_box(ground_truth)
    right = letter_of(ground_truth if truth is None else truth)
    if right is None:
        raise ValueError(
            f"the answer {ground_truth!r} is no letter from A to J; reward.reward_function=choice is for data sets "
            "whose answers are such letters"
        )
    chosen = choice_in(response)
    return verdict(chosen == right, answered=chosen is not None)
