"""Sources are what they name: files, folders with splits; and mistakes that say what to write."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from megatron_vppo.data.dataset import RowError, VisionDataset
from megatron_vppo.data.sources import Source, check_source, open_source, parse_source, splits_of
from tests.data.rows import open_rows


def rows_of(source: object) -> VisionDataset:
    return open_rows(str(source))


def answers(source: object) -> list[str]:
    opened = rows_of(source)
    return [opened.answer(row) for row in range(len(opened))]


def write(path: Path, *answers: str, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"problem": "p", "answer": answer, **more} for answer in answers]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_source_text(tmp_path: Path) -> None:
    odd = tmp_path / "at@home"
    odd.mkdir()
    assert parse_source("org/data@test[:50]") == Source("org/data", "test[:50]")
    assert parse_source("org/data") == Source("org/data", "train")
    assert parse_source(str(odd)) == Source(str(odd), "train")
    assert Source("org/data", "test[:50]").split_name == "test"
    for wrong in ("org/data@", "@test", ""):
        with pytest.raises(ValueError, match="repo@split"):
            parse_source(wrong)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere", "~/rows.jsonl", "nowhere.JSONL@test"])
def test_paths_that_are_not_there_are_not_asked_of_the_hub(source: str) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        check_source(source)


def test_a_file_has_one_split(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "1", "2", "3")
    assert answers(path) == answers(f"{path}@train") == answers(f"{path}@rows") == ["1", "2", "3"]
    assert answers(f"{path}@train[1:]") == ["2", "3"]
    with pytest.raises(ValueError, match=r"a file has no split 'test'; leave out '@test\[:2\]'"):
        open_source(f"{path}@test[:2]")
    assert answers(f"{write(tmp_path / 'val_1.jsonl', '5')}@validation") == ["5"]
    with pytest.raises(ValueError, match="the split leaves none of the 3 rows"):
        open_source(f"{path}@train[7:]")


def test_a_folder_of_files_is_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """Two kinds of files and unequal columns, on which `datasets` gives up."""
    write(tmp_path / "b.jsonl", "2", "3", images=[])
    write(tmp_path / "a.parquet", "1")
    write(tmp_path / "c" / "d.JSONL", "4", level=5)
    write(tmp_path / ".cache" / "e.jsonl", "9")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("none")
    assert answers(tmp_path) == ["1", "2", "3", "4"]
    opened = open_source(str(tmp_path)).rows
    assert [opened.place(row) for row in range(4)] == [
        "a.parquet, row 0", "b.jsonl, line 1", "b.jsonl, line 2", "c/d.JSONL, line 1",
    ]  # fmt: skip
    assert [opened.cell(row, "level") for row in range(4)] == [None, None, None, "5"]


def test_paths_name_the_split(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.parquet", "1")
    write(tmp_path / "data" / "train-00001-of-00002.parquet", "2")
    write(tmp_path / "dev" / "rows.jsonl", "3")
    assert answers(tmp_path) == ["1", "2"]
    assert answers(f"{tmp_path}@train[1:]") == ["2"]
    for name in ("validation", "val", "dev"):
        assert answers(f"{tmp_path}@{name}") == ["3"]
    with pytest.raises(ValueError, match="no file of the split 'test'; the files are those of train, validation"):
        open_source(f"{tmp_path}@test")


def test_damage_in_a_folder_is_named_by_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "1", "2")
    (tmp_path / "b.jsonl").write_text('{"problem"\n')
    opened = rows_of(tmp_path)
    assert len(opened) == 3
    with pytest.raises(RowError, match=r"row 2: not valid JSON: .* \[b\.jsonl, line 1\]"):
        opened.answer(2)
    (tmp_path / "c.parquet").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"c\.parquet is not a parquet file, or is damaged"):
        open_source(str(tmp_path))


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder holds no \.parquet, \.jsonl, \.json file"):
        open_source(str(tmp_path))


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"problem": "p", "answer": str(n)} for n in range(4)])
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict(train=table, test=table.select([3])).save_to_disk(tmp_path / "splits")
    assert answers(tmp_path / "table") == answers(tmp_path / "splits") == ["0", "1", "2", "3"]
    assert answers(f"{tmp_path / 'table'}@train[2:]") == ["2", "3"]
    assert answers(f"{tmp_path / 'splits'}@test") == ["3"]
    with pytest.raises(ValueError, match=r"no split 'val'; it has test, train"):
        open_source(f"{tmp_path / 'splits'}@val")


def test_a_folder_of_images_keeps_the_text_of_its_answers(tmp_path: Path) -> None:
    """`datasets` would take them for dates, numbers and missing values."""
    texts = ['"2024-01-02"', "1.50", "12", '"007"', "true", "1e5"]
    lines = [
        f'{{"file_name": "test_{n}.png", "problem": "<image>p", "answer": {text}}}\n' for n, text in enumerate(texts)
    ]
    for n in range(len(texts)):
        Image.new("RGB", (40 + n, 30)).save(tmp_path / f"test_{n}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(lines) + "{\n")
    rows = open_rows(str(tmp_path), image_key="image")
    expected = ["2024-01-02", "1.50", "12", "007", "true", "1e5"]
    assert [rows.answer(n) for n in range(6)] == expected
    assert [rows.check_image(n, 0) for n in range(6)] == [(40 + n, 30) for n in range(6)]
    with pytest.raises(RowError, match=r"row 6: not valid JSON: .*\[line 7\]"):
        rows.answer(6)
    part = open_rows(f"{tmp_path}@train[4:6]", image_key="image")
    assert [part.answer(n) for n in range(2)] == ["true", "1e5"]


def test_folders_of_images_by_split(tmp_path: Path) -> None:
    for n, split in enumerate(("train", "test")):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40 + n, 30)).save(tmp_path / split / "a.png")
        row = {"file_name": "a.png", "problem": "<image>p", "answer": split}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    for n, split in enumerate(("train", "test")):
        rows = open_rows(f"{tmp_path}@{split}", image_key="image")
        assert (len(rows), rows.answer(0), rows.check_image(0, 0)) == (1, split, (40 + n, 30))


def test_saved_folders_that_are_damaged_are_named(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"problem": "p", "answer": str(n)} for n in range(4)])
    for name in ("cut", "missing", "undescribed"):
        table.save_to_disk(tmp_path / name, num_shards=2)
    shard = "data-00001-of-00002.arrow"
    (tmp_path / "cut" / shard).write_bytes((tmp_path / "cut" / shard).read_bytes()[:200])
    (tmp_path / "missing" / shard).unlink()
    (tmp_path / "undescribed" / "dataset_info.json").unlink()
    for name in ("cut", "missing", "undescribed"):
        with pytest.raises(ValueError, match=rf"data source .*{name}'.* saved by datasets is damaged: "):
            open_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl.gz", "a"])
def test_other_kinds_of_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"unknown kind of file; use one of \.parquet, \.jsonl, \.json or a folder"):
        open_source(str(tmp_path / name))


def test_the_splits_that_a_folder_says_it_has(tmp_path: Path) -> None:
    for name in ("data/train-00000-of-00001.parquet", "data/testing.jsonl", "other.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert splits_of(tmp_path) == {"train", "test"}
    datasets.DatasetDict({"variant1": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(str(tmp_path / "saved"))
    assert splits_of(tmp_path / "saved") == {"variant1"}
