"""The grader of numbers: is the answer within a tolerance of the ground truth?

A number may be a fraction or mixed number, have thousands separators, a power of ten, a percent sign, a currency sign
and a unit, in plain text or LaTeX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_vppo.data.graders.answer_text import after_answer, last_box
from megatron_vppo.data.graders.grade import Grade, verdict

_REWRITES = (
    (r"(?<!\\)\$([^$\n]+)(?<!\\)\$", r" \1 "),  # LaTeX between dollar signs
    (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2"),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2"),
    (r"(?<=\d)(?:\\,|\{,\}|[\u2009\u202f])(?=\d{3})", ","),
    (r"\\(?:left|right|text|textbf|mathrm|mathbf|displaystyle)(?![A-Za-z])", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "\u00b0"),
    (r"\\(?:times|cdot)(?![A-Za-z])|\*", "\u00d7"),
    (r"(?<![\w.\u00d7])(?<!\u00d7 )10\s*\^", "1\u00d710^"),  # a power of ten alone
    (r"\\approx(?![A-Za-z])|\u2248", "="),
    (r"\\([%$])", r"\1"),
    (r"\\[,;:! ]|~", " "),
    (r"[\u2212\u2013]", "-"),
    (r"[{}]", ""),
)
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_SIGN = r"(?:(?<![\w)])[-+](?=[\d.$€£¥])|(?<![\w)])(?<![\w)] )[-+])?"  # and not the minus of `x - 3`
_QUANTITY = re.compile(
    rf"(?P<sign>{_SIGN})\s*(?:(?P<currency>[$€£¥])\s*(?P<inner_sign>[-+]?))?(?<![\w.])(?:(?P<mixed>\d+)\s+(?=\d+\s*/))?"
    rf"(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?"
    r"(?:\s*×\s*10\s*\^\s*\(?(?P<power>[-+]?\d{1,3})\)?|[eE](?P<exponent>[-+]?\d{1,3})(?!\w))?\s*(?P<percent>%|percent\b)?"
)
_UNIT_PART = r"[A-Za-zµμΩ°]+(?:\^?-?\d|[²³])?"
_UNIT = re.compile(rf"(?![xyz]$){_UNIT_PART}(?:\s*[/·×.\s-]\s*{_UNIT_PART})*\.?")
_SQUARES = str.maketrans({"²": "2", "³": "3", "^": "", " ": "", "μ": "µ", "·": "", "×": ""})
_SHORT = {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm",
    "kilometer": "km", "kilometre": "km", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "degree": "°", "deg": "°", "liter": "l", "litre": "l", "dollar": "$", "euro": "€",
    "inch": "in", "inches": "in", "feet": "ft", "foot": "ft",
}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A number as it is written."""

    value: Fraction
    """Without the division by 100 that a percent sign means."""
    percent: bool
    """True if a percent sign follows."""
    unit: str
    """In one spelling; empty: none."""


def quantity_of(answer: str) -> Quantity | None:
    """Reads an answer that is a number and nothing else, besides `x =` before it and a unit after it."""
    text = _rewritten(answer).rpartition("=")[2].strip().strip("()").rstrip(".").strip()
    match = _QUANTITY.match(text)
    if match is None:
        return None
    unit = text[match.end() :].strip()
    if unit and not _UNIT.fullmatch(unit):
        return None
    return _quantity(match, unit)


def last_quantity(text: str) -> Quantity | None:
    """Reads the last number of a text. A word after it is not taken for its unit."""
    matches = list(_QUANTITY.finditer(_rewritten(text)))
    return _quantity(matches[-1], "") if matches else None


def quantity_in(response: str) -> Quantity | None:
    """Reads the content of the last `\\boxed{}`; without one, the last number after "answer is", or of the text."""
    box = last_box(response)
    if box is not None:
        return quantity_of(box)
    rest = after_answer(response)
    return (last_quantity(rest) if rest is not None else None) or last_quantity(response)


def agree(found: Quantity, right: Quantity, *, relative: float, absolute: float) -> bool:
    """Returns True if |found - right| <= max(absolute, relative * |right|) and the units do not contradict.

    A unit is compared where both have one. Where one alone has a percent sign, 50% is 50 as well as 0.5.
    """
    if found.unit and right.unit and found.unit != right.unit:
        return False
    pairs = [(found.value, right.value)]
    if found.percent and not right.percent:
        pairs.append((found.value / 100, right.value))
    if right.percent and not found.percent:
        pairs.append((found.value, right.value / 100))
    return any(abs(x - y) <= max(Fraction(absolute), Fraction(relative) * abs(y)) for x, y in pairs)


def grade(response: str, ground_truth: str, *, relative: float, absolute: float) -> Grade:
    """Grades the number that a response ends with.

    Raises:
        ValueError: the ground truth is no number.
    """
    truth = last_box(ground_truth)
    right = quantity_of(ground_truth if truth is None else truth)
    if right is None:
        raise ValueError(
            f"the answer {ground_truth!r} is no number; reward.reward_function=number is for data sets whose answers "
            "are numbers"
        )
    found = quantity_in(response)
    is_right = found is not None and agree(found, right, relative=relative, absolute=absolute)
    return verdict(is_right, answered=found is not None)


def _rewritten(text: str) -> str:
    """Returns plain text for LaTeX."""
    for pattern, plain in _REWRITES:
        text = re.sub(pattern, plain, text)
    return text.strip()


def _quantity(match: re.Match[str], unit: str) -> Quantity | None:
    """Computes the number of a match; None if it has a zero below its line, or too many digits to read."""
    try:
        top, bottom = (Fraction((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
        value = int(match["mixed"] or 0) + top / bottom
    except (ValueError, ZeroDivisionError):
        return None
    value *= Fraction(10) ** int(match["power"] or match["exponent"] or 0)
    if "-" in (match["sign"], match["inner_sign"]):
        value = -value
    return Quantity(value, percent=bool(match["percent"]), unit=_one_spelling(unit) or match["currency"] or "")


def _one_spelling(unit: str) -> str:
    words = [_SHORT.get(word, word) for word in map(_singular, re.split(r"(\W+|\d+)", unit.rstrip(".")))]
    return "".join(words).translate(_SQUARES)


def _singular(word: str) -> str:
    """Takes the plural's ending and the capital off a word that is written out; 'ms' and 'Pa' stay."""
    return word.lower().removesuffix("s") if len(word) > 3 and word not in _SHORT else word
