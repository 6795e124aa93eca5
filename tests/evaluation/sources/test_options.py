"""Options in texts: labelled A, B, ... in this order, the last such series."""

from __future__ import annotations

import pytest

from megatron_vppo.evaluation.sources.options import options_in, with_options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Is f even? (A) yes (B) no", ("yes", "no")),
        ("In triangle A: see B. Then?\nA. 5\nB. 6\nC. 7", ("5", "6", "7")),
        ("Which?A、红 B、蓝", ("红", "蓝")),
        ("Angle $A. B$ is 5", ()),
        ("Only A. 5", ()),
        ("B. 5 A. 6", ()),
        ("A. 5 C. 6", ()),
        ("", ()),
    ],
)
def test_options_in_a_text(text: str, options: tuple[str, ...]) -> None:
    assert options_in(text) == options


def test_options_below_a_question() -> None:
    assert with_options("Which?", ["x", "y"]) == "Which?\nA. x\nB. y"
    assert with_options("Which?", []) == "Which?"
