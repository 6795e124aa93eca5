"""Grades the answer pairs of tests/data/graders/answer_pairs.json with MathRuler and Math-Verify, prints every pair on
which one of them is wrong, and writes the counts into docs/rewards.md, with those of the grader of a category's kind.

python tools/grader_table.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_vppo.data.graders import choice, math_verify, mathruler, number

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT / "tests" / "data" / "graders" / "answer_pairs.json"
PAGE = ROOT / "docs" / "rewards.md"
BEGIN, END = "<!-- table: tools/grader_table.py -->\n", "<!-- end of table -->\n"
GRADERS = {"mathruler": mathruler.grade, "math_verify": math_verify.grade}
NUMBER = partial(number.grade, relative=1e-6, absolute=0.0)
OF_KIND = {"choices": choice.grade, **dict.fromkeys(("fractions", "units", "scientific", "percent"), NUMBER)}
"""The grader of some categories' kind of answers."""


@dataclass(frozen=True)
class Pair:
    """A response and the answer of its row."""

    category: str
    response: str
    truth: str
    right: bool
    """True if a person would call the response right."""


@dataclass(frozen=True)
class GradedPair:
    """A pair and the verdict of each grader."""

    pair: Pair
    verdicts: dict[str, bool]

    def is_wrong(self, grader: str) -> bool:
        return self.verdicts[grader] != self.pair.right


def read_pairs() -> list[Pair]:
    return [Pair(**fields) for fields in json.loads(PAIRS.read_text(encoding="utf-8"))]


def graded(pairs: Sequence[Pair]) -> list[GradedPair]:
    return [
        GradedPair(pair, {name: grade(pair.response, pair.truth).reward == 1.0 for name, grade in GRADERS.items()})
        for pair in pairs
    ]


def table(found: Sequence[GradedPair]) -> str:
    """Returns the counts of each category, and of all."""
    lines = [
        "| Category | Pairs | Disagreements | `mathruler` right, `math_verify` right | Refused although right "
        "| Accepted although wrong | `choice` or `number` right |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(name, [one for one in found if one.pair.category == name]) for name in categories(found)),
        row("all", found),
    ]
    return "".join(f"{line}\n" for line in lines)


def categories(found: Sequence[GradedPair]) -> list[str]:
    """Returns the categories in the order of the file."""
    return list(dict.fromkeys(one.pair.category for one in found))


def row(name: str, found: Sequence[GradedPair]) -> str:
    differ = sum(len({*one.verdicts.values()}) > 1 for one in found)
    rights, refused, accepted = (
        ", ".join(str(sum(counts(one, grader) for one in found)) for grader in GRADERS)
        for counts in (
            lambda one, grader: not one.is_wrong(grader),
            lambda one, grader: one.is_wrong(grader) and one.pair.right,
            lambda one, grader: one.is_wrong(grader) and not one.pair.right,
        )
    )
    own = str(sum(right_by_kind(one.pair) for one in found)) if name in OF_KIND else ""
    return f"| {name} | {len(found)} | {differ} | {rights} | {refused} | {accepted} | {own} |"


def right_by_kind(pair: Pair) -> bool:
    """Returns True if the grader of the pair's kind agrees. An answer that it cannot read is a reward of zero."""
    try:
        verdict = OF_KIND[pair.category](pair.response, pair.truth).reward == 1.0
    except ValueError:
        verdict = False
    return verdict == pair.right


def disagreements(found: Sequence[GradedPair]) -> str:
    """Returns a line for every pair that one of the graders gets wrong."""
    lines = []
    for one in found:
        wrong = [grader for grader in GRADERS if one.is_wrong(grader)]
        if wrong:
            truth = f"is {one.pair.truth}" if one.pair.right else f"is not {one.pair.truth}"
            lines.append(f"{one.pair.category}: {one.pair.response} {truth}; wrong: {', '.join(wrong)}\n")
    return "".join(lines)


def main() -> None:
    found = graded(read_pairs())
    print(disagreements(found) + table(found), end="")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(before + table(found) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
