"""We-Math: options in one string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.sources.copies import colors, questions_of, stored, write_parquet


def row(option: str, answer: str = "B") -> dict[str, Any]:
    return {
        "ID": "3steps_multi_7",
        "split": "testmini",
        "knowledge concept": "Area of circles",
        "question": "What is the area?",
        "option": option,
        "answer": answer,
        "image_path": stored("green"),
        "key": "3steps_multi",
        "question number": 1575,
        "knowledge concept description": "...",
    }


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer", "200.96|3215.36|6280|32|No correct answer"),
        ("A. yes ; B. no;  C. both; D. none", "yes|no|both|none"),
        ("A. 1;B. 2;C. 3;D. 4;E. 5;F. 6;G. No correct answer", "1|2|3|4|5|6|No correct answer"),
        ("A. 3 m; 4 m\nB.5 m\nC. 6 m\nD. 7 m", "3 m; 4 m|5 m|6 m|7 m"),
        ("A.Point A;B.Point B;C.Point C;D.Point D", "Point A|Point B|Point C|Point D"),
    ],
)
def test_options_with_uneven_separators(tmp_path: Path, option: str, options: str) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row(option)])
    (question,) = questions_of("we_math", tmp_path / "testmini.parquet")
    assert question.options == tuple(options.split("|"))
    lines = [f"{letter}. {text}" for letter, text in zip("ABCDEFG", options.split("|"), strict=False)]
    assert question.problem == "\n".join(["<image>What is the area?", *lines])
    assert question.categories == {"key": "3steps_multi", "concept": "Area of circles"}
    assert (question.answer, question.rule.kind, colors(question)) == ("B", "choice", ["green"])


def test_steps_of_a_problem_share_its_id(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row("A. 1; B. 2")] * 2)
    questions = questions_of("we_math", tmp_path / "testmini.parquet")
    assert [question.id for question in questions] == ["3steps_multi_7", "3steps_multi_7 (2)"]


def test_options_that_cannot_be_told_apart(tmp_path: Path) -> None:
    write_parquet(tmp_path / "testmini.parquet", [row("200.96; 3215.36")])
    with pytest.raises(ValueError, match=r"row 0: 'option' holds no options A\., B\., \.\.\.: '200\.96; 3215\.36'"):
        questions_of("we_math", tmp_path / "testmini.parquet")
