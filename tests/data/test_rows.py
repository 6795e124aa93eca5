"""Local files are read as they are written: the file that was named, as it is now, with its text as text."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vppo.data.columns import RowExtras
from megatron_vppo.data.dataset import RowError, VisionDataset
from tests.data.rows import open_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def lines(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def problems(dataset: VisionDataset) -> list[str]:
    return [dataset.problem(row) for row in range(len(dataset))]


def answers(dataset: VisionDataset) -> list[str]:
    return [dataset.answer(row) for row in range(len(dataset))]


# --- The file that was named ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["exp[1]", "only[2]", "a*", "q?", "{x,y}", "100%", "sp ace", "@home", "ä"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_path_is_no_pattern(tmp_path: Path, folder: str, kind: str) -> None:
    """Next to a folder that the name would match if it were one."""
    for name in ("exp1", "only2", "abc", "qx", "x"):
        lines(tmp_path / name / "train.jsonl", {"problem": "the neighbour's", "answer": "1"})
        parquet(tmp_path / name / "train.parquet", problem=["the neighbour's"], answer=["1"])
    path = tmp_path / folder / f"train.{kind}"
    path.parent.mkdir()
    if kind == "jsonl":
        lines(path, {"problem": "mine", "answer": "1"})
    else:
        parquet(path, problem=["mine"], answer=["1"])
    assert problems(open_rows(str(path))) == ["mine"]
    assert problems(open_rows(f"{path}@train")) == ["mine"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_file_that_was_replaced_is_read_anew_whatever_its_time(tmp_path: Path, kind: str) -> None:
    """`rsync -t` and `cp -p` leave such a file: another content with the same size and time."""
    path = tmp_path / f"train.{kind}"
    for text in ("first", "other"):
        if kind == "parquet":
            parquet(path, problem=[text], answer=["1"])
        elif kind == "json":
            path.write_text(json.dumps([{"problem": text, "answer": "1"}]))
        else:
            lines(path, {"problem": text, "answer": "1"})
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert problems(open_rows(str(path))) == [text]


def test_split_expressions_of_a_file(tmp_path: Path) -> None:
    source = lines(tmp_path / "r.jsonl", *({"problem": f"p{i}", "answer": "1"} for i in range(10)))
    for expression, expected in (("train[2:4]", ["p2", "p3"]), ("train[-1:]", ["p9"]), ("train[:20%]", ["p0", "p1"])):
        assert problems(open_rows(f"{source}@{expression}")) == expected
    assert problems(open_rows(f"{source}@train[2:]", max_rows=2)) == ["p2", "p3"]
    with pytest.raises(ValueError, match=r"r\.jsonl@train\[oops\]"):
        open_rows(f"{source}@train[oops]")


# --- Text as text -----------------------------------------------------------------------------------------------------


def test_json_answers_are_the_text_of_the_file(tmp_path: Path) -> None:
    written = ["2024-05-06", "2024-05-06 07:08:09", "12:30", "007", "1e5", "True", "null", "1,000"]
    rows = [f'{{"problem": "p", "answer": "{text}"}}' for text in written]
    assert answers(open_rows(lines(tmp_path / "a.jsonl", *rows))) == written
    numbers = ["0.10", "12", "12.0", "1e5", "-3", "12345678901234567890", "0.1234567890123456789"]
    rows = [f'{{"problem": "p", "answer": {text}}}' for text in numbers]
    assert answers(open_rows(lines(tmp_path / "b.jsonl", *rows))) == numbers
    (tmp_path / "c.json").write_text("[" + ",".join(rows) + "]")
    assert answers(open_rows(str(tmp_path / "c.json"))) == numbers
    for name in ("d.json", "d.jsonl"):  # a list of objects, whatever the file is called
        (tmp_path / name).write_text('[{"problem": "p", "answer": true}, {"problem": "p", "answer": Infinity}]')
        assert answers(open_rows(str(tmp_path / name))) == ["true", "Infinity"]


def test_extras_are_as_they_are_stored(tmp_path: Path) -> None:
    """Dates, bytes and single precision of parquet; a file of a folder without such a column has none."""
    info = {"day": [datetime.date(2026, 11, 30)], "image": [b"\x89PNG"], "level": pa.array([0.1], pa.float32())}
    extra = pa.StructArray.from_arrays([pa.array(values) for values in info.values()], list(info))
    parquet(tmp_path / "a.parquet", problem=["p"], answer=["1"], extra_info=extra, data_source=info["level"])
    lines(tmp_path / "b.jsonl", {"problem": "p", "answer": "1", "data_source": "geo"})
    dataset = open_rows(str(tmp_path))
    single = float(np.float32(0.1))
    day = datetime.date(2026, 11, 30)
    assert dataset.extras(0) == RowExtras(single, {"day": day, "image": b"\x89PNG", "level": single})
    assert dataset.extras(1) == RowExtras("geo", None)
    saved = datasets.Dataset.from_dict({"problem": ["p"], "answer": ["1"], "extra_info": [{"n": 3}]})
    saved.save_to_disk(tmp_path / "saved")
    assert open_rows(str(tmp_path / "saved")).extras(0) == RowExtras(None, {"n": 3})


def test_extras_that_python_does_not_have(tmp_path: Path) -> None:
    text = pa.array([b"\xff"]).cast(pa.binary()).view(pa.string())
    doubled = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["n", "n"])
    late = pa.array([2**62], pa.timestamp("us"))
    unreadable = "a value that cannot be read"
    for number, (value, reason) in enumerate(((text, "not UTF-8"), (doubled, unreadable), (late, unreadable))):
        table = parquet(tmp_path / f"{number}.parquet", problem=["p"], answer=["1"], extra_info=value)
        with pytest.raises(RowError, match=f"row 0: column 'extra_info': {reason}"):
            open_rows(table).extras(0)


def test_values_that_are_no_answer(tmp_path: Path) -> None:
    """pandas writes NaN where an answer is missing; JSON allows half of a surrogate pair, tokenizers do not."""
    json_lines = lines(
        tmp_path / "a.jsonl",
        '{"problem": "p", "answer": NaN}',
        '{"problem": "p", "answer": "\\ud83d"}',
        '{"problem": "\\ude00", "answer": "\\ud83d\\ude00"}',
    )
    opened = open_rows(json_lines)
    for read, row, message in (
        (opened.answer, 0, "column 'answer' holds no answer: 'None'"),
        (opened.answer, 1, "column 'answer' holds half of a character"),
        (opened.problem, 2, "column 'problem' holds half of a character"),
    ):
        with pytest.raises(RowError, match=message):
            read(row)
    assert opened.answer(2) == "\U0001f600"
    table = parquet(tmp_path / "b.parquet", problem=["p"], answer=pa.array([float("nan")], pa.float32()))
    with pytest.raises(RowError, match="column 'answer' holds no answer"):
        open_rows(table).answer(0)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([0.1, 2.35, 12.0], pa.float32()), ["0.1", "2.35", "12"]),
        (pa.array([0.1, 2.35, 1e22, 12.0]), ["0.1", "2.35", "1e+22", "12"]),
        (pa.array([np.float16(0.1), np.float16(3)], pa.float16()), ["0.1", "3"]),
        (pa.array([1, -2], pa.int8()), ["1", "-2"]),
        (pa.array([2**63], pa.uint64()), [str(2**63)]),
        (pa.array([decimal.Decimal("1.50")], pa.decimal128(5, 2)), ["1.50"]),
        (pa.array([datetime.date(2024, 5, 6)]), ["2024-05-06"]),
        (pa.array([datetime.datetime(2024, 5, 6, 7, 8, 9)]), ["2024-05-06 07:08:09"]),
        (pa.array([datetime.time(7, 8)]), ["07:08:00"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([True]), ["True"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_parquet_answers_are_the_shortest_text_of_their_type(
    tmp_path: Path, column: pa.Array, expected: list[str]
) -> None:
    source = parquet(tmp_path / "a.parquet", problem=["p"] * len(column), answer=column)
    assert answers(open_rows(source)) == expected


def test_parquet_of_groups_with_dictionaries_of_their_own(tmp_path: Path) -> None:
    """A writer leaves them if it writes a column of categories part by part."""
    parts = [
        pa.table({"problem": pa.array(list(text)).dictionary_encode(), "answer": list("12")}) for text in ("ab", "ca")
    ]
    with pq.ParquetWriter(tmp_path / "groups.parquet", parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)
    dataset = open_rows(str(tmp_path / "groups.parquet"))
    assert problems(dataset) == list("abca")
    assert problems(pickle.loads(pickle.dumps(dataset))) == list("abca")


def test_integers_next_to_a_missing_value(tmp_path: Path) -> None:
    """pandas stores them as floating point; the row without an answer is the one that is named."""
    dataset = open_rows(parquet(tmp_path / "a.parquet", problem=["p", "p"], answer=pa.array([12.0, None])))
    assert dataset.answer(0) == "12"
    with pytest.raises(RowError, match=r"a\.parquet, row 1: column 'answer' holds no answer: 'None'"):
        dataset.answer(1)


# --- Images and rows without ------------------------------------------------------------------------------------------


def test_rows_with_images_after_many_without(tmp_path: Path, image_folder: Path) -> None:
    """Types are not guessed from the first block of a file: 30,000 rows with an empty list come first."""
    row = {"problem": "p" * 400, "answer": "1", "images": []}
    rows = [row] * 30_000 + [row | {"images": ["a.png"]}, row | {"images": [{"path": "b.png"}]}]
    dataset = open_rows(lines(tmp_path / "many.jsonl", *rows), image_dir=str(image_folder))
    assert len(dataset) == 30_002
    assert [dataset.image_cells(0), dataset.image_size(30_000, 0), dataset.image_size(30_001, 0)] == [
        [], (90, 60), (60, 120),
    ]  # fmt: skip


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.list_(pa.binary()), pa.large_list(pa.binary())])
def test_encoded_images_in_a_column_of_bytes(tmp_path: Path, image_folder: Path, type_: pa.DataType) -> None:
    data = (image_folder / "a.png").read_bytes()
    cell = [data] if pa.types.is_list(type_) or pa.types.is_large_list(type_) else data
    dataset = open_rows(
        parquet(tmp_path / "a.parquet", problem=["p"] * 2, answer=["1"] * 2, images=pa.array([cell, None], type_))
    )
    assert dataset.check_image(0, 0) == (90, 60)
    assert dataset.image_cells(1) == []


def test_a_file_without_a_column_of_images_has_rows_without_images(tmp_path: Path) -> None:
    dataset = open_rows(lines(tmp_path / "text.jsonl", {"problem": "2+2?", "answer": 4, "level": 3}))
    assert not dataset.has_image_column and dataset.image_cells(0) == []
    for cell in (["a.png"], {"path": "a.png"}, "a.png", "photos/B.JPG", "c.webp"):
        source = lines(tmp_path / "other.jsonl", {"problem": "p", "answer": 1, "pics": cell})
        with pytest.raises(ValueError, match=r"no column 'images'; it has problem, answer, pics\. Set data\.image_key"):
            open_rows(source)


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_a_damaged_line_is_named_by_row_and_line_and_hurts_no_other(tmp_path: Path) -> None:
    good = {"problem": "p", "answer": "1"}
    dataset = open_rows(lines(tmp_path / "d.jsonl", good, "", '{"problem": "p", "ans', "[1]", good, "   ", good))
    assert len(dataset) == 5
    with pytest.raises(RowError, match=r"d\.jsonl, row 1: not valid JSON: .* \[line 3\]"):
        dataset.problem(1)
    with pytest.raises(RowError, match=r"d\.jsonl, row 2: a line holds one JSON object, .* b'\[1\]' \[line 4\]"):
        dataset.answer(2)
    assert [dataset.problem(row) for row in (0, 3, 4)] == ["p"] * 3
    error = dataset.error(4, "why")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and str(error).endswith("row 4: why [line 7]")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"problem": "p", "answer": "1"}\n', "p"),  # a byte-order mark
        (b'{"problem": "p", "answer": "1"}\r\n{"problem": "q", "answer": "1"}\r\n', "p"),
        (b'{"problem": "p", "answer": "1"}', "p"),  # no newline at the end
        ('{"problem": "\u4e2d\u2028x", "answer": "1"}\n'.encode(), "\u4e2d\u2028x"),  # a line separator within text
    ],
)
def test_forms_that_a_line_may_have(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    dataset = open_rows(str(tmp_path / "r.jsonl"))
    assert dataset.problem(0) == expected
    assert pickle.loads(pickle.dumps(dataset)).problem(0) == expected


def damaged_inside(folder: Path) -> bytes:
    """A parquet file whose end, which describes it, is whole."""
    table = parquet(folder / "whole.parquet", problem=["p"] * 1000, answer=[str(n) for n in range(1000)])
    data = Path(table).read_bytes()
    return data[:100] + b"\xff" * 400 + data[500:]


def doubled(folder: Path) -> bytes:
    """A parquet file with two columns of one name, as a join leaves them."""
    columns = [pa.array(["p"]), pa.array(["q"]), pa.array(["1"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["problem", "problem", "answer"]), folder / "doubled.parquet")
    return (folder / "doubled.parquet").read_bytes()


def test_text_of_parquet_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"p", b"f\xfcr"], pa.binary()).view(pa.string())  # the second is Latin-1
    dataset = open_rows(parquet(tmp_path / "latin.parquet", problem=texts, answer=["1", "2"]))
    assert dataset.problem(0) == "p"
    with pytest.raises(RowError, match=r"row 1: not UTF-8 text: .*byte 0xfc in position 1"):
        dataset.problem(1)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.jsonl", b"", "the file has no rows"),
        ("b.jsonl", b"\n \n", "the file has no rows"),
        ("c.json", b'[{"problem": ', "c.json is not valid JSON"),
        ("d.parquet", b"PAR1", "d.parquet is not a parquet file, or is damaged"),
        ("e.parquet", b"", "e.parquet is not a parquet file, or is damaged"),
        ("f.jsonl", b'\xff\xfe{"p": 1}\n', r"no row can be read; .* Row 0: not UTF-8 text: .* \[line 1\]"),
        ("g.json", b'{\n "data": []\n}', r"no row can be read; a file holds one JSON object per line, or one list of"),
        ("h.jsonl", b"{}\n{}\n", "its rows are empty"),
        ("j.parquet", doubled(tmp_path), r"j\.parquet has several columns of the name 'problem'"),
        ("i.parquet", damaged_inside(tmp_path), "i.parquet is not a parquet file, or is damaged: Corrupt"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_rows(str(tmp_path / name))


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_the_copy_of_a_parquet_file_is_made_in_parts(tmp_path: Path) -> None:
    """Arrow's own count of what it holds: a part of a file of 32 row groups of a MiB, and nothing afterwards."""
    schema = pa.schema({"problem": pa.string(), "answer": pa.string(), "images": pa.binary()})
    with pq.ParquetWriter(tmp_path / "large.parquet", schema, use_dictionary=False) as writer:
        for number in range(32):
            row = {"problem": "p", "answer": str(number), "images": np.random.default_rng(number).bytes(1 << 20)}
            writer.write_table(pa.Table.from_pylist([row], schema))
    usual, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.system_memory_pool())
    pa.set_memory_pool(counted)
    try:
        dataset = open_rows(str(tmp_path / "large.parquet"))
        assert [len(dataset.image_bytes(row, 0)) for row in range(32)] == [1 << 20] * 32
        assert counted.max_memory() < 16 << 20
        assert counted.bytes_allocated() < 1 << 20
    finally:
        pa.set_memory_pool(usual)
