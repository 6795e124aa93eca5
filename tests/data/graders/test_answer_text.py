"""The last box, and what follows "answer is"."""

from __future__ import annotations

import pytest

from megatron_vppo.data.graders.answer_text import after_answer, last_box, tidied


def test_the_last_box_with_the_braces_in_it() -> None:
    assert last_box(r"\boxed{4} \boxed{\frac{1}{2}} x}") == r"\frac{1}{2}"
    assert last_box(r"\boxed{}") == ""
    assert last_box("5") is last_box(r"\boxed{5") is None


@pytest.mark.parametrize(
    ("response", "rest"),
    [
        ("Answer: B\nbecause", "B"),
        ("**Answer:** B", "B"),
        ("the answer is: 4. The final ANSWER = 5", "5"),
        ("the answers: 4", None),
        ("an answer", None),
    ],
)
def test_what_follows_the_answer(response: str, rest: str | None) -> None:
    assert after_answer(response) == rest


def test_spaces_around_signs_go() -> None:
    assert tidied(" < think >\n1 / 2 = x") == "<think>1/2 = x"
