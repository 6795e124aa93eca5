"""MMMU-Pro: shuffled marks, images in options, options as a string, and questions in the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.sources.copies import colors, questions_of, stored, write_parquet


def row(question: str, options: Any, **changes: Any) -> dict[str, Any]:
    images = {f"image_{number}": None for number in range(1, 8)}
    return {
        "id": "test_Art_1",
        "question": question,
        "options": options,
        "explanation": "?",
        **images,
        "img_type": "['Paintings']",
        "answer": "B",
        "topic_difficulty": "Hard",
        "subject": "Art",
    } | changes


def test_images_come_in_the_order_of_their_marks(tmp_path: Path) -> None:
    """Options are shuffled, so <image 3> comes before <image 2>; each means the column of its number."""
    pictured = row(
        "Which is like <image 1>?",
        "['<image 3>', '<image 2>', 'neither']",
        image_1=stored("green"),
        image_2=stored("red"),
        image_3=stored("blue"),
    )
    write_parquet(tmp_path / "test.parquet", [pictured])
    (question,) = questions_of("mmmu_pro", tmp_path / "test.parquet")
    assert question.problem == "Which is like <image>?\nA. <image>\nB. <image>\nC. neither"
    assert colors(question) == ["green", "blue", "red"]
    assert (question.answer, question.rule.kind) == ("B", "choice")
    assert question.categories == {"subject": "Art", "difficulty": "Hard"}


def test_an_image_shown_twice_and_one_that_no_mark_names(tmp_path: Path) -> None:
    """An image without a mark may show the solution."""
    shown = row("<image 2> or <image 2>?", "['a', 'b']", image_1=stored("red"), image_2=stored("blue"))
    write_parquet(tmp_path / "test.parquet", [shown])
    (question,) = questions_of("mmmu_pro", tmp_path / "test.parquet")
    assert colors(question) == ["blue", "blue"]
    assert question.problem.startswith("<image> or <image>?")


def test_options_are_a_list_of_python_in_a_string(tmp_path: Path) -> None:
    options = ['it\'s "so"', "[1, 2]", "a, b", *"defghij"]
    rows = [row("Which of <image 1>?", str(options), image_1=stored("red"))]
    write_parquet(tmp_path / "standard (10 options)" / "test-00000-of-00001.parquet", rows)
    (question,) = questions_of("mmmu_pro", tmp_path / "standard (10 options)")
    assert question.options == tuple(options)
    assert question.problem.endswith("\nI. i\nJ. j")


def test_the_question_in_the_image(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "image": stored("red"), "options": "['a', 'b']", "answer": "A", "subject": "Art"},
        {"id": "2", "image": stored("blue"), "options": "['c', 'd', 'e']", "answer": "C", "subject": "Music"},
    ]
    write_parquet(tmp_path / "vision" / "test-00000-of-00001.parquet", rows)
    questions = questions_of("mmmu_pro", tmp_path / "vision")
    assert [question.problem for question in questions] == ["<image>Answer the question shown in the image."] * 2
    assert [colors(question) for question in questions] == [["red"], ["blue"]]
    assert questions[1].options == ("c", "d", "e")


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("Look at <image 1>.", "['a', 'b']", "column 'image_1' holds no image, though the question shows it"),
        ("Which?", "a, b", "'options' is no list of Python: 'a, b'"),
        ("Which?", "['a']", "'options' is no list of 2 to 10 options"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, question: str, options: str, message: str) -> None:
    write_parquet(tmp_path / "test.parquet", [row(question, options)])
    with pytest.raises(ValueError, match=rf"test\.parquet, row 0: {message}"):
        questions_of("mmmu_pro", tmp_path / "test.parquet")
