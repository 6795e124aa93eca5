"""DynaMath: variants in files of their own, and a rule of grading for each type of answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.evaluation.grading import grade
from tests.evaluation.sources.copies import colors, questions_of, stored, write_parquet


def row(name: str, answer: str, kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "question": "What is the area?",
        "image": f"images/{name}.png",
        "decoded_image": stored("red"),
        "ground_truth": answer,
        "answer_type": kind,
        "subject": "plane geometry",
        "knowledge_level": "high school",
    } | changes


def test_variants_of_a_question_in_files_of_their_own(tmp_path: Path) -> None:
    for variant, answer in ((1, "3.142"), (2, "6.283"), (10, "9.425")):
        write_parquet(
            tmp_path / "data" / f"sample_variant{variant}-00000-of-00001.parquet",
            [row("1", answer, "float"), row("2", str(variant), "int")],
        )
    questions = questions_of("dynamath", tmp_path)
    assert [(one.id, one.variant_of) for one in questions] == [
        ("1 variant 1", "1"),
        ("2 variant 1", "2"),
        ("1 variant 10", "1"),
        ("2 variant 10", "2"),
        ("1 variant 2", "1"),
        ("2 variant 2", "2"),
    ]
    assert questions[0].categories == {"subject": "plane geometry", "level": "high school", "answer type": "float"}
    assert (questions[0].problem, colors(questions[0])) == ("<image>What is the area?", ["red"])
    assert "sample_variant10-00000-of-00001.parquet, row 0" in questions[2].place


@pytest.mark.parametrize(
    ("kind", "answer", "right", "wrong"),
    [
        ("float", "3.142", "\\boxed{\\pi}", "\\boxed{3.144}"),
        ("int", "12", "\\boxed{12}", "\\boxed{112}"),
        ("multiple choice", "A", "\\boxed{(A)}", "\\boxed{B}"),
        ("text", "even", "\\boxed{It is Even}", "\\boxed{odd}"),
        ("single answer", "x=2", "\\boxed{x = 2}", "\\boxed{x = 3}"),
        ("float", "sqrt(2)", "\\boxed{sqrt(2)}", "\\boxed{2}"),
    ],
)
def test_each_type_of_answer_has_its_rule(tmp_path: Path, kind: str, answer: str, right: str, wrong: str) -> None:
    path = tmp_path / "sample_variant1.parquet"
    write_parquet(path, [row("1", answer, kind, question="Is f even? (A) yes (B) no")])
    (question,) = questions_of("dynamath", path)
    assert grade(right, question.answer, rule=question.rule, options=question.options).accuracy == 1.0
    assert grade(wrong, question.answer, rule=question.rule, options=question.options).accuracy == 0.0
    assert question.options == (("yes", "no") if kind == "multiple choice" else ())


def test_the_copy_of_lmms_eval_has_the_variants_in_one_file(tmp_path: Path) -> None:
    rows = [row("1", "5", "int", question_id="q1"), row("2", "6", "int", question_id="q1")]
    write_parquet(tmp_path / "test.parquet", rows)
    questions = questions_of("dynamath", tmp_path / "test.parquet")
    assert [(one.id, one.variant_of) for one in questions] == [("q1", "q1"), ("q1 (2)", "q1")]
