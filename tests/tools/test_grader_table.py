"""The page of the rewards has the counts that the program writes, over 200 pairs whose verdict a person gave."""

from __future__ import annotations

import grader_table
from grader_table import GradedPair, Pair


def test_the_page_has_the_table() -> None:
    page = grader_table.PAGE.read_text(encoding="utf-8")
    body = page[page.index(grader_table.BEGIN) + len(grader_table.BEGIN) : page.index(grader_table.END)]
    assert body == grader_table.table(grader_table.graded(grader_table.read_pairs())), (
        "run python tools/grader_table.py"
    )


def test_the_pairs_are_200_of_12_categories_and_none_is_there_twice() -> None:
    pairs = grader_table.read_pairs()
    assert len({(pair.response, pair.truth) for pair in pairs}) == len(pairs) == 200
    sizes = [sum(pair.category == name for pair in pairs) for name in {pair.category for pair in pairs}]
    assert len(sizes) == 12 and min(sizes) >= 14
    assert 40 < sum(not pair.right for pair in pairs) < 80


def test_counts_by_hand() -> None:
    right, wrong = Pair("a", "1", "1", True), Pair("b", "2", "3", False)
    found = [
        GradedPair(right, {"mathruler": False, "math_verify": True}),
        GradedPair(right, {"mathruler": False, "math_verify": False}),
        GradedPair(wrong, {"mathruler": False, "math_verify": True}),
    ]
    rows = grader_table.table(found).splitlines()[2:]
    assert rows == ["| a | 2 | 1 | 0, 1 | 2, 1 | 0, 0 |  |", "| b | 1 | 1 | 1, 0 | 0, 0 | 0, 1 |  |",
                    "| all | 3 | 2 | 1, 1 | 2, 1 | 0, 1 |  |"]  # fmt: skip
    assert grader_table.disagreements(found) == (
        "a: 1 is 1; wrong: mathruler\na: 1 is 1; wrong: mathruler, math_verify\nb: 2 is not 3; wrong: math_verify\n"
    )


def test_a_pair_of_each_kind_is_graded() -> None:
    """MathRuler refuses unreduced fractions; Math-Verify does not look at units."""
    pairs = [
        Pair("", r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
        Pair("", r"\boxed{3 m}", "3 cm", False),
        Pair("", r"\boxed{5}", "5", True),
    ]
    verdicts = [list(one.verdicts.values()) for one in grader_table.graded(pairs)]
    assert verdicts == [[False, True], [False, True], [True, True]]


def test_the_grader_of_a_kind_is_asked_where_there_is_one() -> None:
    pairs = [
        Pair("units", r"\boxed{3 m}", "3 cm", False),
        Pair("units", r"\boxed{300 cm}", "3 m", True),  # it converts none
        Pair("units", r"\boxed{3}", r"\pi", False),  # it cannot read the answer
    ]
    assert [grader_table.right_by_kind(pair) for pair in pairs] == [True, False, True]
    assert grader_table.table(grader_table.graded(pairs)).splitlines()[2].endswith("| 2 |")
