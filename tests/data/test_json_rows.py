"""JSON files by random access: entries and lines are found without parsing them, and nothing of them is kept."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.data.json_rows import JsonList, entries_of_list
from megatron_vppo.data.rows import BadRow
from megatron_vppo.data.sources import read_file

HOSTILE = ['"', "\\", '\\"', "[", "]", "{", "}", ",", "],[", '"}]', "\n", "\u2028", "\u00e9\u4e2d", "\\\\", ""]


def random_value(source: random.Random, depth: int) -> Any:
    kind = source.randrange(6 if depth else 4)
    if kind == 4:
        return [random_value(source, depth - 1) for _ in range(source.randrange(4))]
    if kind == 5:
        return {source.choice(HOSTILE) + str(i): random_value(source, depth - 1) for i in range(source.randrange(4))}
    return [source.choice(HOSTILE) * source.randrange(3), 3, None, True][kind]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_entries_are_those_that_a_parser_finds(tmp_path: Path, indent: int | None, ascii_only: bool) -> None:
    source = random.Random(5)
    for _ in range(60):
        rows = [{"a": random_value(source, 3), "b": source.choice(HOSTILE)} for _ in range(source.randrange(1, 6))]
        data = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
        begins, ends = entries_of_list(data)
        assert [json.loads(data[a:b]) for a, b in zip(begins, ends, strict=True)] == rows
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf \n" + data + b" \n")
    assert [read_file(tmp_path / "a.json").cell(n, "b") for n in range(len(rows))] == [row["b"] for row in rows]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[{}", "the list has no end"),
        (b'[{"a": "]}', "a bracket at byte 8 closes nothing"),
        (b'[{"a": 1}}]', "a bracket at byte 9 closes nothing"),
        (b"[[}]", "a bracket at byte 2 closes nothing"),
        (b"[{}] {}", r"behind the list, at byte 4, stands b'\{\}'"),
    ],
)
def test_what_is_no_list_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        entries_of_list(data)


def test_a_damaged_entry_hurts_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1}, {"a" 2}, [3], {"a": {"b": 4}},\n {"a": "\xff"}]')
    rows = JsonList(path)
    copy = pickle.loads(pickle.dumps(rows))
    for one in (rows, copy):
        assert (len(one), one.columns, one.cell(0, "a"), one.cell(3, "a", ("b",))) == (5, ("a",), "1", "4")
        assert one.cell(0, "a", ("b",)) is None, "a number has no fields"
        for row, message in ((1, "not valid JSON"), (2, "an entry of the list holds one"), (4, "not UTF-8")):
            with pytest.raises(BadRow, match=message):
                one.cell(row, "a")
    assert len(pickle.dumps(rows)) < 1000 < path.stat().st_size + 1000, "a copy for another process has no rows in it"
    path.write_bytes(b" [ ] ")
    assert len(JsonList(path)) == 0


@pytest.mark.parametrize("piece", [1, 7, 16])
def test_lines_across_the_pieces_in_which_a_file_is_searched(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_vppo.data.json_rows.PIECE_BYTES", piece)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": "{"x" * n}"}}\n' for n in range(20)) + '{"n": "last"}')
    rows = read_file(path)
    assert [rows.cell(row, "n") for row in range(len(rows))] == ["x" * n for n in range(20)] + ["last"]
    assert [rows.place(row) for row in (0, 20)] == ["line 1", "line 21"]
