"""Geometry3K: lists of images, and the test split among others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.sources.copies import colors, questions_of, stored, write_parquet


def test_a_list_of_images(tmp_path: Path) -> None:
    rows = [
        {"images": [stored("red")], "problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }"},
        {"images": [stored("blue"), stored("red")], "problem": "<image><image>Find $y$.", "answer": "7.5"},
    ]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows[:1])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    questions = questions_of("geometry3k", tmp_path)
    assert [colors(question) for question in questions] == [["red"], ["blue", "red"]]
    assert [question.answer for question in questions] == ["2 \\sqrt { 221 }", "7.5"]
    assert [question.problem for question in questions] == ["<image>Find $x$.", "<image><image>Find $y$."]
    assert questions[0].rule.kind == "mathruler"
    assert len(questions_of("geometry3k", f"{tmp_path}@train")) == 1, "a split that is named wins"


def test_another_format_is_named_with_the_columns_that_there_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [{"images": [stored("red")], "problem": "Which?", "ground_truth": "A"}])
    with pytest.raises(ValueError, match=r"no column 'answer'; it has images, problem, ground_truth\. Is `source`"):
        questions_of("geometry3k", tmp_path / "test.parquet")
