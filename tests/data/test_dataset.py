"""Every form a data set may come in gives the same rows; broken images are found and named."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_vppo.data.columns import Column, Columns
from megatron_vppo.data.dataset import RowError, VisionDataset
from megatron_vppo.data.rows import DatasetRows
from tests.data.images import noise_image
from tests.data.rows import open_rows

ROWS = [
    {"problem": "<image>How many?", "answer": "3", "images": ["a.png"]},
    {"problem": "<image> or <image>?", "answer": "left", "images": ["b.png", "c.jpg"]},
    {"problem": "2+2?", "answer": "4", "images": []},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def with_image_feature(folder: Path) -> datasets.Dataset:
    features = datasets.Features(
        problem=datasets.Value("string"), answer=datasets.Value("string"), images=datasets.List(datasets.Image())
    )
    rows = [row | {"images": [{"bytes": (folder / p).read_bytes(), "path": p} for p in row["images"]]} for row in ROWS]
    return datasets.Dataset.from_list(rows, features=features)


def write_parquet_with_image_feature(folder: Path) -> str:
    with_image_feature(folder).to_parquet(folder / "released.parquet")
    return str(folder / "released.parquet")


def write_parquet_of_bytes_dicts(folder: Path) -> str:
    rows = [row | {"images": [{"bytes": (folder / p).read_bytes()} for p in row["images"]]} for row in ROWS]
    datasets.Dataset.from_list(rows).to_parquet(folder / "plain.parquet")
    return f"{folder / 'plain.parquet'}@train"


def write_jsonl_of_paths(folder: Path) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder / "rows.jsonl")


def write_json_of_paths(folder: Path) -> str:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return str(folder / "rows.json")


def write_folder_with_split_file(folder: Path) -> str:
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return f"{folder}@dev"


def write_saved_to_disk(folder: Path) -> str:
    datasets.DatasetDict(test=with_image_feature(folder)).save_to_disk(folder / "saved")
    return f"{folder / 'saved'}@test"


def write_hub_layout(folder: Path) -> str:
    (folder / "repo" / "data").mkdir(parents=True)
    with_image_feature(folder).to_parquet(folder / "repo" / "data" / "test-00000-of-00001.parquet")
    return f"{folder / 'repo'}@test"


@pytest.mark.parametrize(
    "write",
    [
        write_parquet_with_image_feature,
        write_parquet_of_bytes_dicts,
        write_jsonl_of_paths,
        write_json_of_paths,
        write_folder_with_split_file,
        write_saved_to_disk,
        write_hub_layout,
    ],
)
def test_every_source_gives_the_same_rows(write, image_folder: Path) -> None:
    dataset = open_rows(write(image_folder))
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert len(copy) == 3
        assert [copy.problem(i) for i in range(3)] == [row["problem"] for row in ROWS]
        assert [copy.answer(i) for i in range(3)] == ["3", "left", "4"]
        assert [len(copy.image_cells(i)) for i in range(3)] == [1, 2, 0]
        assert [copy.image_size(0, 0), copy.image_size(1, 0), copy.image_size(1, 1)] == [(90, 60), (60, 120), (100, 80)]
        with Image.open(image_folder / "c.jpg") as expected:
            assert np.array_equal(np.asarray(copy.image(1, 1)), np.asarray(expected))


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_folder_of_images_with_metadata(kind: str, image_folder: Path) -> None:
    (image_folder / "turned.jpg").unlink()
    names = ["a.png", "b.png", "c.jpg"]
    if kind == "metadata.csv":
        lines = ["file_name,problem,answer", *(f"{name},<image>{name}?,{i}" for i, name in enumerate(names))]
        (image_folder / kind).write_text("\n".join(lines))
    else:
        rows = [{"file_name": name, "problem": f"<image>{name}?", "answer": i} for i, name in enumerate(names)]
        (image_folder / kind).write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_rows(str(image_folder), image_key="image")
    assert [dataset.problem(i) for i in range(3)] == ["<image>a.png?", "<image>b.png?", "<image>c.jpg?"]
    assert [dataset.answer(i) for i in range(3)] == ["0", "1", "2"]
    assert [dataset.check_image(i, 0) for i in range(3)] == [(90, 60), (60, 120), (100, 80)]


def test_answers_of_mixed_type_and_single_image_cells(image_folder: Path) -> None:
    rows = [
        {"problem": "p", "answer": 5, "images": "a.png"},
        {"problem": "p", "answer": "x", "images": ["a.png", {"path": "b.png"}]},
    ]
    (image_folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_rows(str(image_folder / "m.jsonl"))
    assert [dataset.answer(0), dataset.answer(1)] == ["5", "x"]
    assert [dataset.image_size(0, 0), dataset.image_size(1, 1)] == [(90, 60), (60, 120)]


def test_image_dir_and_row_limits(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = str(tmp_path / "rows.jsonl")
    assert open_rows(source, image_dir=str(image_folder)).image_size(0, 0) == (90, 60)
    assert len(open_rows(source, max_rows=2)) == 2
    assert len(open_rows(f"{source}@train[:1]")) == 1
    with pytest.raises(RowError, match=r"rows\.jsonl, row 0: image 0 cannot be read: No such file.*data\.image_dir"):
        open_rows(source).image_size(0, 0)


def test_camera_orientation_is_applied_to_size_and_pixels_alike(image_folder: Path) -> None:
    (image_folder / "t.jsonl").write_text(json.dumps({"problem": "p", "answer": "1", "images": ["turned.jpg"]}))
    dataset = open_rows(str(image_folder / "t.jsonl"))
    with Image.open(image_folder / "turned.jpg") as stored:
        expected = ImageOps.exif_transpose(stored)
    assert dataset.image_size(0, 0) == dataset.check_image(0, 0) == (30, 50)
    assert np.array_equal(np.asarray(dataset.image(0, 0)), np.asarray(expected))


def broken_images(folder: Path) -> dict[str, bytes]:
    whole = {"png": (folder / "a.png").read_bytes(), "jpg": (folder / "c.jpg").read_bytes()}
    gif, webp = io.BytesIO(), io.BytesIO()
    noise_image(40, 40).save(gif, "GIF")
    noise_image(40, 40).save(webp, "WEBP")
    flipped = bytearray(whole["png"])
    flipped[len(flipped) // 2] ^= 0xFF
    gap = slice(len(whole["jpg"]) // 3, len(whole["jpg"]) * 2 // 3)
    holed = bytearray(whole["jpg"])
    holed[gap] = np.random.default_rng(3).bytes(len(holed[gap]))
    assert holed.endswith(b"\xff\xd9"), "its end mark is still there"
    return {
        "truncated png": whole["png"][:-200],
        "damaged png": bytes(flipped),
        "truncated jpg": whole["jpg"][: len(whole["jpg"]) // 2],
        "damaged jpg": bytes(holed),
        "truncated gif": gif.getvalue()[: len(gif.getvalue()) // 2],
        "truncated webp": webp.getvalue()[: len(webp.getvalue()) // 2],
        "no image": b"<html>not found</html>",
        "empty file": b"",
    }


@pytest.mark.parametrize(
    "name",
    [
        "truncated png",
        "damaged png",
        "truncated jpg",
        "damaged jpg",
        "truncated gif",
        "truncated webp",
        "no image",
        "empty file",
    ],
)
def test_broken_image_is_named(name: str, image_folder: Path) -> None:
    data = broken_images(image_folder)[name]
    table = datasets.Dataset.from_list(
        [
            ROWS[2] | {"images": [{"bytes": (image_folder / "a.png").read_bytes()}]},
            ROWS[2] | {"images": [{"bytes": data}]},
        ]
    )
    columns = Columns(Column("problem"), Column("answer"), Column("images"), "marks")
    dataset = VisionDataset(DatasetRows(table), source="mine.parquet", image_root=image_folder, columns=columns)
    assert dataset.check_image(0, 0) == (90, 60)
    why = {"no image": r"of no type that can be read, it begins with b'<html>not found", "empty file": "empty"}
    with pytest.raises(
        RowError, match=rf"mine\.parquet, row 1: image 0 is unreadable or truncated: {why.get(name, '')}"
    ) as caught:
        dataset.check_image(1, 0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.source, again.row, str(again)) == ("mine.parquet", 1, str(caught.value))


@pytest.mark.parametrize("address", ["https://example.com/a.png", "file:///a.png", "s3://b/a.png", "data:image/png;x"])
def test_addresses_are_no_files(address: str, image_folder: Path) -> None:
    (image_folder / "web.jsonl").write_text(json.dumps({"problem": "p", "answer": "1", "images": [address]}))
    with pytest.raises(RowError, match=r"row 0: image 0 is an address \(.*\); images are read from files"):
        open_rows(str(image_folder / "web.jsonl")).image_size(0, 0)


@pytest.mark.parametrize("stored", ["aGVsbG8=", "", [137, 80, 78, 71], {"data": "x"}, 3, True])
def test_bytes_that_are_none(stored: object, image_folder: Path) -> None:
    """JSON has no bytes; what stands there instead is base64, or a list of numbers."""
    cell = {"bytes": stored, "path": "a.png"}
    (image_folder / "b64.jsonl").write_text(json.dumps({"problem": "p", "answer": "1", "images": [cell]}))
    with pytest.raises(RowError, match=r"row 0: image 0 has 'bytes' of type \w+; JSON holds paths.*\[line 1\]"):
        open_rows(str(image_folder / "b64.jsonl")).image_size(0, 0)


def test_base64_in_place_of_a_path_is_not_printed_whole(image_folder: Path) -> None:
    (image_folder / "b64.jsonl").write_text(json.dumps({"problem": "p", "answer": "1", "images": ["iVBORw0K" * 9999]}))
    with pytest.raises(RowError, match=r"row 0: image 0 cannot be read: .*iVBORw0K.*\[line 1\]") as caught:
        open_rows(str(image_folder / "b64.jsonl")).image_size(0, 0)
    assert len(str(caught.value)) < 1000


def test_missing_columns_and_sources_say_what_to_set(image_folder: Path) -> None:
    write_jsonl_of_paths(image_folder)
    with pytest.raises(
        ValueError, match=r"no column 'question'; it has problem, answer, images\. Set data\.prompt_key"
    ):
        open_rows(str(image_folder / "rows.jsonl"), problem_key="question")
    with pytest.raises(ValueError, match=r"no column 'image'.*Set data\.image_key"):
        open_rows(str(image_folder / "rows.jsonl"), image_key="image")
    with pytest.raises(ValueError, match=r"nowhere\.parquet does not exist"):
        open_rows(str(image_folder / "nowhere.parquet"))
    with pytest.raises(ValueError, match="unknown kind of file"):
        open_rows(str(image_folder / "a.png"))
