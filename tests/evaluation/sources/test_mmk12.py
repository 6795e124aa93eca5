"""MMK12: options in the text, and the test split among others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.sources.copies import colors, questions_of, stored, write_parquet


def row(name: str, answer: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "question": "Which graph is right? ( )\nA. the first\nB. the second\nC. none\nD. both",
        "answer": answer,
        "subject": "physics",
        "image": stored("blue"),
    } | changes


def test_options_in_the_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [row("other", "A")])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [row("a", "B"), row("b", "A")])
    with caplog.at_level(logging.WARNING):
        questions = questions_of("mmk12", tmp_path)
    assert [question.id for question in questions] == ["a", "b"], "of the test split, though the path names none"
    assert questions[0].options == ("the first", "the second", "none", "both")
    assert questions[0].problem.startswith("<image>Which graph")
    assert (questions[0].answer, questions[0].rule.kind) == ("B", "choice")
    assert questions[0].categories == {"subject": "physics"}
    assert colors(questions[0]) == ["blue"]
    assert "has 2 rows, and 2000 (test) were released" in caplog.text


def test_a_mark_that_is_there_is_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_parquet(path, [row("a", "B", question="In <image>, which? A. x B. y")])
    (question,) = questions_of("mmk12", path)
    assert question.problem == "In <image>, which? A. x B. y"
