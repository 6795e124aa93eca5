"""Questions as a data set: prompts and images are made of it like of any other."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from megatron_vppo.data.dataset import RowError
from megatron_vppo.evaluation.encoded import FileImage
from megatron_vppo.evaluation.question import dataset_of
from tests.evaluation.sources.copies import questions_of, stored, write_parquet


def test_questions_are_rows_whose_images_are_read_on_demand(tmp_path: Path) -> None:
    rows = [
        {"images": [stored("red")], "problem": "<image>Find $x$.", "answer": "5"},
        {"images": [stored("blue"), stored("red")], "problem": "<image><image>Find $y$.", "answer": "7.5"},
    ]
    write_parquet(tmp_path / "test.parquet", rows)
    questions = questions_of("geometry3k", tmp_path / "test.parquet")
    for dataset in (dataset_of(questions), pickle.loads(pickle.dumps(dataset_of(questions)))):
        assert len(dataset) == 2
        assert (dataset.problem(1), dataset.answer(1)) == ("<image><image>Find $y$.", "7.5")
        assert len(dataset.image_cells(1)) == 2
        assert dataset.image_size(1, 1) == (28, 28)
        assert dataset.image(1, 0).getpixel((0, 0)) == (0, 0, 255)
        assert dataset.image(1, 1).getpixel((0, 0)) == (255, 0, 0)


def test_errors_name_benchmark_question_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [{"images": [stored("red")], "problem": "<image>x", "answer": "5"}])
    (question,) = questions_of("geometry3k", tmp_path / "test.parquet")
    error = dataset_of([question]).error(0, "too long")
    assert str(error).startswith("tiny, row 0: too long [question 0, ")
    assert str(error).endswith("test.parquet, row 0]")


def test_an_image_that_is_gone_is_an_error_of_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [{"images": ["red.png"], "problem": "<image>x", "answer": "5"}])
    (tmp_path / "red.png").write_bytes(stored("red")["bytes"])
    (question,) = questions_of("geometry3k", tmp_path / "test.parquet", images=str(tmp_path))
    assert question.images == (FileImage(tmp_path / "red.png"),)
    (tmp_path / "red.png").unlink()
    with pytest.raises(RowError, match=r"tiny, row 0: .*red\.png cannot be read: No such file"):
        dataset_of([question]).image(0, 0)
