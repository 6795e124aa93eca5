"""MathVision: options as texts, as letters alone or none, and several tags for one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.sources.copies import colors, questions_of, stored, write_parquet


def row(name: str, question: str, options: list[str], answer: str) -> dict[str, Any]:
    return {
        "id": name,
        "question": question,
        "options": options,
        "image": f"images/{name}.jpg",
        "decoded_image": stored("red"),
        "answer": answer,
        "solution": None,
        "level": 2,
        "subject": "counting",
    }


def test_options_as_texts_as_letters_and_none(tmp_path: Path) -> None:
    rows = [
        row("1", "How many?\n<image1>", ["5", "6", "7", "8", "9"], "B"),
        row("2", "Which one?\n<image1>", ["A", "B", "C", "D", "E"], "E"),
        row("3", "How long is <image1> it?", [], "12"),
        row("4", "Which expression?\n<image1>", [], "\\frac{1}{2}"),
    ]
    write_parquet(tmp_path / "test.parquet", rows)
    questions = questions_of("mathvision", tmp_path / "test.parquet")
    assert [question.problem for question in questions] == [
        "<image>How many?\n\nA. 5\nB. 6\nC. 7\nD. 8\nE. 9",
        "<image>Which one?",
        "<image>How long is  it?",
        "<image>Which expression?",
    ]
    assert [question.options for question in questions] == [("5", "6", "7", "8", "9"), (), (), ()]
    assert [question.rule.kind for question in questions] == ["choice", "choice", "mathruler", "mathruler"]
    assert questions[0].categories == {"subject": "counting", "level": "2"}
    assert all(colors(question) == ["red"] for question in questions)


def test_several_tags_are_parts_of_one_image(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "test.parquet",
        [row("1", "<image1> Which piece fits?", ["<image2>", "<image3>", "<image4>"], "C")],
    )
    (question,) = questions_of("mathvision", tmp_path / "test.parquet")
    assert question.problem == "<image>(image 1) Which piece fits?\nA. (image 2)\nB. (image 3)\nC. (image 4)"
    assert question.options == ("(image 2)", "(image 3)", "(image 4)")
    assert colors(question) == ["red"]


def test_options_that_are_no_list(tmp_path: Path) -> None:
    rows = [row("1", "How many?", [], "5") | {"options": "A. 5"}]
    write_parquet(tmp_path / "test.parquet", rows)
    with pytest.raises(ValueError, match=r"row 0: 'options' is no list of texts: 'A\. 5'"):
        questions_of("mathvision", tmp_path / "test.parquet")
