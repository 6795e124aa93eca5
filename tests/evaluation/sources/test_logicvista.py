"""LogicVista: several letters, numbers, no answer, and the JSON file of its repository."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_vppo.evaluation.grading import grade
from tests.evaluation.sources.copies import colors, png, questions_of, stored, write_json, write_parquet

ROWS = [("A, C", "letters"), ("B, D", "letters"), ("3", "mathruler"), ("D", "choice")]


def test_kinds_of_answers_and_a_row_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "Which? A. x B. y C. z D. u", "answer": answer, "image": stored("red")} for answer, _ in ROWS]
    rows.insert(2, {"question": "Which?", "answer": "", "image": stored("blue")})
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    with caplog.at_level(logging.WARNING):
        questions = questions_of("logicvista", tmp_path)
    assert "1 of 5 rows are left out: it has no answer" in caplog.text
    assert [(question.answer, question.rule.kind) for question in questions] == ROWS
    assert [question.id for question in questions] == ["0", "1", "3", "4"], "numbers of rows in the file"
    assert questions[0].options == ("x", "y", "z", "u")
    assert colors(questions[0]) == ["red"]
    assert grade("\\boxed{C, A}", questions[0].answer, rule=questions[0].rule).accuracy == 1.0


def test_the_file_of_the_repository(tmp_path: Path) -> None:
    """An object of rows by name; one row spells a key in another way."""
    for name, color in (("v1_0.png", "red"), ("v1_1.png", "blue")):
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "images" / name).write_bytes(png(color))
    row = {"question": "Which? A. x B. y", "answer": "B", "skill": ["deductive"], "broad_capability": ["diagrams"]}
    content = {
        "v1_0": {"imagename": "v1_0.png", **row, "sourcelink": "x"},
        "v1_1": {"imagename": "v1_1.png", **row, "sourceli,nk": "x", "skill": ["spatial", "numerical"]},
    }
    path = tmp_path / "data" / "dataset.json"
    write_json(path, content)
    with pytest.raises(ValueError, match=r"dataset\.json, row 0: its image 'v1_0\.png' is not in .* \[v1_0\]"):
        questions_of("logicvista", path)
    questions = questions_of("logicvista", path, images=str(tmp_path / "data" / "images"))
    assert [(one.id, one.categories) for one in questions] == [
        ("v1_0", {"skill": "deductive"}),
        ("v1_1", {"skill": "spatial, numerical"}),
    ]
    assert [colors(question) for question in questions] == [["red"], ["blue"]]
