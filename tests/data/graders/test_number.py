"""Numbers against readings by hand: fractions, separators, powers, percent, units, and the edges of the tolerances."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_vppo.data.graders.grade import Grade
from megatron_vppo.data.graders.number import Quantity, grade, quantity_in, quantity_of

READ = [
    ("5", "5", ""),
    ("-5", "-5", ""),
    ("\u22125", "-5", ""),
    ("+5.50", "5.5", ""),
    (".5", "1/2", ""),
    ("1,234,567.5", "1234567.5", ""),
    (r"12\,345", "12345", ""),
    ("12{,}345", "12345", ""),
    ("1/3", "1/3", ""),
    (r"-\frac{1}{3}", "-1/3", ""),
    (r"\dfrac12", "1/2", ""),
    (r"1\frac{1}{2}", "3/2", ""),
    ("1 1/2", "3/2", ""),
    ("-1 1/2", "-3/2", ""),
    (r"2\times10^{-3}", "0.002", ""),
    (r"1.5 \cdot 10^2", "150", ""),
    ("1.5e3", "1500", ""),
    ("10^6", "1000000", ""),
    ("-10^{-2}", "-0.01", ""),
    ("2 * 10^2", "200", ""),
    ("x=5", "5", ""),
    (r"$\angle A \approx 30^{\circ}$", "30", "\u00b0"),
    ("30 degrees", "30", "\u00b0"),
    ("$5$", "5", ""),
    (r"\$5", "5", "$"),
    ("-$5.20", "-5.2", "$"),
    ("5 dollars", "5", "$"),
    ("3 cm", "3", "cm"),
    ("3 centimetres", "3", "cm"),
    ("3 inches", "3", "in"),
    (r"3\text{ cm}^2", "3", "cm2"),
    ("3 cm\u00b2", "3", "cm2"),
    (r"3\ \mathrm{m/s}^{2}", "3", "m/s2"),
    ("3 kg\u00b7m", "3", "kgm"),
    ("5 apples.", "5", "apple"),
    ("10 ms", "10", "ms"),
]
UNREAD = ["red", "", "3 or 4", "(3,4)", "3, 4", "1,23", "5-3", "1/0", "1/2/3", "2x", "1e9999", "9" * 5000]


@pytest.mark.parametrize(("answer", "value", "unit"), READ)
def test_a_number_is_read_exactly(answer: str, value: str, unit: str) -> None:
    assert quantity_of(answer) == Quantity(Fraction(value), percent=False, unit=unit)


@pytest.mark.parametrize("answer", [r"50\%", "50%", "50 percent", "50 %"])
def test_a_percent_sign_is_kept_apart(answer: str) -> None:
    assert quantity_of(answer) == Quantity(Fraction(50), percent=True, unit="")


@pytest.mark.parametrize("answer", UNREAD)
def test_anything_else_is_no_number(answer: str) -> None:
    assert quantity_of(answer) is None


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (r"7, so \boxed{8}, not 9", "8"),
        (r"7 \boxed{no number}", None),
        ("The answer is 7 of them.\nThere are 9.", "7"),
        ("Answer: unclear, but 3 + 4 = 7", "7"),
        ("Answer: unclear.\nIt was 1,234 apples", "1234"),
        ("12 cm and then x - 3.", "3"),
        ("it fell to -3.", "-3"),
        ("no number", None),
    ],
)
def test_the_number_that_a_response_ends_with(response: str, value: str | None) -> None:
    found = quantity_in(response)
    assert (None if found is None else found.value) == (None if value is None else Fraction(value))


def right(response: str, ground_truth: str, relative: float = 0.0, absolute: float = 0.0) -> bool:
    return grade(f"\\boxed{{{response}}}", ground_truth, relative=relative, absolute=absolute).reward == 1.0


def test_the_tolerances_end_where_they_say() -> None:
    """1/64 and 1/4 are exact in binary."""
    assert right("65", "64", relative=1 / 64) and not right("65.001", "64", relative=1 / 64)
    assert right("-63", "-64", relative=1 / 64) and not right("-62.999", "-64", relative=1 / 64)
    assert not right("64", "65.1", relative=1 / 64), "the share is that of the answer"
    assert right("0.25", "0", absolute=0.25) and not right("0.2501", "0", absolute=0.25)
    assert right("65", "64", relative=1 / 64, absolute=0.25), "the larger of both holds"
    assert right("1/3", r"\frac{2}{6}") and not right("0.333333", "1/3")


def test_units_are_compared_where_both_have_one() -> None:
    assert right("3 cm", "3 centimeters") and right("3", "3 cm") and right("3 cm", "3")
    assert not right("3 cm", "3 m") and not right("3 m", r"3\text{ m}^2")


def test_percent_against_a_plain_number_is_either() -> None:
    assert right("50%", "0.5") and right("50%", "50") and right("0.5", r"50\%") and right("50", "50%")
    assert right("50%", "50 percent") and not right("0.5%", "50%") and not right("5%", "0.5")


def test_grades_say_if_there_was_an_answer() -> None:
    def graded(response: str) -> Grade:
        return grade(response, r"\boxed{7}", relative=0.0, absolute=0.0)

    assert graded(r"\boxed{7}") == Grade(1.0, 1.0, {"answered": 1.0})
    assert graded("8") == Grade(0.0, 0.0, {"answered": 1.0})
    assert graded("?") == Grade(0.0, 0.0, {"answered": 0.0})


def test_a_data_set_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'red' is no number; reward\.reward_function=number is for"):
        grade("7", "red", relative=0.0, absolute=0.0)
