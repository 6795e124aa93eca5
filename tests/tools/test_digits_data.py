"""The digits data set: schema, truth of its answers against scikit-learn, disjoint scans, same bytes from a seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from digits.folder import build_once
from digits.pairs import PAIRS
from digits.rows import write_data
from digits.scans import draw_scans, split_scans
from sklearn.datasets import load_digits

ARGUMENTS = {"train": 60, "val": 20, "held_out": 0.25, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "data"
    build_once(out, ARGUMENTS, lambda partial: write_data(partial, PAIRS, **ARGUMENTS))
    return out


def rows_of(folder: Path, split: str):
    return load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train", cache_dir=folder / "hf")


@pytest.mark.parametrize(("split", "count"), [("train", 60), ("val", 20)])
def test_rows_are_what_scikit_learn_says(folder, split, count):
    rows = rows_of(folder, split)
    scans = json.loads((folder / "labels.json").read_text())[split]["scans"]
    truth = load_digits()
    assert rows.column_names == ["problem", "answer", "images"]
    assert len(rows) == len(scans) == count
    for row, (left, right) in zip(rows, scans, strict=True):
        assert row["problem"].count("<image>") == 1
        assert row["answer"] == str(truth.target[left] + truth.target[right])
        (image,) = row["images"]
        assert image.size == (112, 56)
        # A 7x7 block of a smooth enlargement keeps about its scan's grey value: wrong scan, side or polarity fail.
        blocks = np.asarray(image.convert("L"), dtype=float).reshape(8, 7, 16, 7).mean(axis=(1, 3))
        expected = 255 - np.hstack((truth.images[left], truth.images[right])) * 255 / 16
        assert np.abs(blocks - expected).mean() < 20
        assert np.corrcoef(blocks.ravel(), expected.ravel())[0, 1] > 0.97


def test_training_and_held_out_scans_are_disjoint(folder):
    labels = json.loads((folder / "labels.json").read_text())
    seen = {split: set(np.ravel(labels[split]["scans"]).tolist()) for split in ("train", "val")}
    assert seen["train"] and seen["val"]
    assert not seen["train"] & seen["val"]
    train, held_out = split_scans(1797, held_out=0.25, seed=5)
    assert sorted([*train, *held_out]) == list(range(1797))
    assert len(held_out) == 449


def test_pairs_are_all_different():
    pairs = draw_scans(np.arange(4), each=2, count=12, seed=0)
    assert len(set(pairs)) == 12 and all(left != right for left, right in pairs)
    with pytest.raises(ValueError, match="13 different choices of 2 wanted, but 4 scans make only 12"):
        draw_scans(np.arange(4), each=2, count=13, seed=0)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    for name, seed in (("again", 5), ("other", 6)):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, PAIRS, **{**ARGUMENTS, "seed": seed})
    for file in ("train.parquet", "val.parquet", "labels.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (folder / file).read_bytes()


def test_a_folder_is_built_once_and_whole_or_not_at_all(tmp_path):
    out, calls = tmp_path / "out", []

    def build(partial: Path) -> dict[str, int]:
        calls.append(partial)
        assert partial != out
        (partial / "content").write_text("x")
        return {"calls": len(calls)}

    assert build_once(out, {"a": 1}, build) == ({"calls": 1}, False)
    assert build_once(out, {"a": 1}, build) == ({"calls": 1}, True)
    assert build_once(out, {"a": 2}, build) == ({"calls": 2}, False)

    def fail(partial: Path) -> dict[str, int]:
        (partial / "content").write_text("half")
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        build_once(out, {"a": 3}, fail)
    assert (out / "content").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="was not built by this program"):
        build_once(tmp_path, {}, lambda partial: {})
    assert (tmp_path / "thesis.txt").exists()
