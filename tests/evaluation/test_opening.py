"""The rows of a benchmark's file: the split that is meant, and names that are unique."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest

from megatron_vppo.config.choices import BenchmarkSource
from megatron_vppo.evaluation.opening import numbered, rows_of
from tests.evaluation.sources.copies import write_parquet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a row of each of two splits."""
    for split in ("train", "test"):
        write_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet", [{"problem": split}])
    return tmp_path / "set"


def problem_of(source: BenchmarkSource, path: str) -> str:
    (row,), _ = rows_of("tiny", source, path, None)
    return row.text("problem")


def test_a_folder_is_read_from_its_test_split_however_its_path_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    for path in ("set", "set/", "./set", "set/../set", str(folder) + os.sep):
        assert problem_of("geometry3k", path) == "test", path
        assert problem_of("geometry3k", f"{path}@train") == "train", path


@pytest.mark.parametrize("source", get_args(BenchmarkSource))
def test_every_source_means_the_test_split(folder: Path, source: BenchmarkSource) -> None:
    assert problem_of(source, str(folder)) == "test"


def test_a_folder_without_a_test_split_is_read_as_it_is(folder: Path) -> None:
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    assert problem_of("rows", str(folder)) == "train"


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        ("a b a a", ["a", "b", "a (2)", "a (3)"]),
        ("a a_(2) a", ["a", "a (2)", "a (3)"]),
        ("a a a_(2)", ["a", "a (2)", "a (2) (2)"]),
    ],
)
def test_names_are_unique(names: str, unique: list[str]) -> None:
    assert list(numbered([name.replace("_", " ") for name in names.split()])) == unique
