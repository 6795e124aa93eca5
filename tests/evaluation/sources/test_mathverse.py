"""MathVerse: versions with and without an image or a text, choices in the text, free answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.sources.copies import colors, questions_of, stored, write_parquet


def row(number: int, version: str, **changes: Any) -> dict[str, Any]:
    return {
        "sample_index": str(number),
        "problem_index": "7",
        "problem_version": version,
        "question": "Find the angle.\nChoices:\nA:50°\nB:55°\nC:60°\nD:65°",
        "image": stored("red"),
        "answer": "D",
        "question_type": "multi-choice",
        "metadata": {"split": "testmini", "source": "x", "subject": "Plane Geometry", "subfield": "Angle"},
        "query_wo": "Please directly answer the question.",
        "question_for_eval": "Find the angle.\nChoices:\nA:50°\nB:55°\nC:60°\nD:65°",
    } | changes


def test_a_version_with_text_and_image(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row(1, "Text Dominant")])
    (question,) = questions_of("mathverse", tmp_path / "testmini.parquet")
    assert question.problem == "<image>Find the angle.\nChoices:\nA:50°\nB:55°\nC:60°\nD:65°"
    assert question.options == ("50°", "55°", "60°", "65°")
    assert (question.answer, question.rule.kind, question.id) == ("D", "choice", "1")
    assert question.categories == {"version": "Text Dominant", "subject": "Plane Geometry", "subfield": "Angle"}
    assert colors(question) == ["red"]


def test_versions_of_a_problem_are_variants_of_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row(1, "Text Lite"), row(2, "Vision Intensive")])
    assert [one.variant_of for one in questions_of("mathverse", tmp_path / "testmini.parquet")] == ["7", "7"]


@pytest.mark.parametrize("image", ["", None, {"bytes": None, "path": ""}])
def test_text_only_has_no_image(tmp_path: Path, image: Any) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row(1, "Text Only", image=image)])
    (question,) = questions_of("mathverse", tmp_path / "testmini.parquet")
    assert question.images == ()
    assert question.problem.startswith("Find the angle.")


def test_an_empty_image_in_another_version_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row(1, "Text Only", image=""), row(2, "Text Lite", image="")])
    with pytest.raises(ValueError, match=r"testmini\.parquet, row 1: 'image' is empty in the version 'Text Lite'"):
        questions_of("mathverse", tmp_path / "testmini.parquet")


def test_vision_only_has_its_question_in_the_image(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row(1, "Vision Only", question="")])
    (question,) = questions_of("mathverse", tmp_path / "testmini.parquet")
    assert question.problem == "<image>Answer the question shown in the image."
    assert question.options == ("50°", "55°", "60°", "65°"), "for a response that gives the text of an option"
    write_parquet(tmp_path / "testmini.parquet", [row(1, "Text Lite", question="")])
    with pytest.raises(ValueError, match="row 0: 'question' is empty"):
        questions_of("mathverse", tmp_path / "testmini.parquet")


def test_free_answers_and_the_authors_set_without_them(tmp_path: Path) -> None:
    free = row(2, "Text Lite", question_type="free-form", answer="\\frac{1}{2}", question="How long?")
    path = tmp_path / "testmini.parquet"
    write_parquet(path, [row(1, "Text Lite"), free])
    both = questions_of("mathverse", path)
    assert [question.rule.kind for question in both] == ["choice", "mathruler"]
    assert both[1].options == ()
    assert [question.id for question in questions_of("mathverse", path, multiple_choice_only=True)] == ["1"]
    # The authors' grader is used for what is left, and does not decide on what that is.
    authors = questions_of("mathverse", path, multiple_choice_only=True, grader="mathruler")
    assert [(question.id, question.rule.kind) for question in authors] == [("1", "mathruler")]
    write_parquet(path, [free])
    with pytest.raises(ValueError, match=r"none of the 1 rows .* is left; leave out `multiple_choice_only`"):
        questions_of("mathverse", path, multiple_choice_only=True)


def test_a_type_of_question_that_is_not_known(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row(1, "Text Lite", question_type="essay")])
    with pytest.raises(ValueError, match="question_type is 'essay', and none of multi-choice, free-form"):
        questions_of("mathverse", tmp_path / "testmini.parquet")
