"""The kept check of all rows: the same prompts as a check gives, and none at all where the file is not as written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vppo.data.dataset import RowError
from megatron_vppo.data.row_cache import CheckedRows, RowCache, UsableRows, file_identity, fingerprint_of

CHECKED = CheckedRows(
    usable=UsableRows.of([(0, [5, 6, 7], ((1, 2, 4),)), (2, [8], ()), (5, [9, 9], ((1, 2, 2), (1, 6, 4)))]),
    too_long=(1, 4),
    bad=(RowError("rows.jsonl", 3, "image 0 is unreadable", "line 4"), RowError("rows.jsonl", 6, "no text", None)),
    transparent=2,
)


def plain(checked: CheckedRows | None) -> Any:
    assert checked is not None
    rows = checked.usable.rows.tolist()
    usable = [(row, checked.usable.ids_of(i), checked.usable.grids_of(i)) for i, row in enumerate(rows)]
    return usable, checked.too_long, [(e.source, e.row, e.reason, e.place) for e in checked.bad], checked.transparent


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "kept", "a" * 64)
    assert cache.load() is None
    cache.save(CHECKED)
    assert plain(cache.load()) == plain(CHECKED)
    assert str(cache.load().bad[0]) == "rows.jsonl, row 3: image 0 is unreadable [line 4]"  # type: ignore[union-attr]
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".npz"]
    nothing = CheckedRows(usable=UsableRows.of([]), too_long=(0,), bad=(), transparent=0)
    RowCache(tmp_path / "kept", "b" * 64).save(nothing)
    assert plain(RowCache(tmp_path / "kept", "b" * 64).load()) == plain(nothing)


def test_rows_in_arrays_are_those_that_were_gathered() -> None:
    """Four bytes a token and eight for each other number, whatever Python takes for a tuple."""
    usable = CHECKED.usable
    assert (usable.rows.tolist(), usable.ids.tolist(), usable.id_ends.tolist()) == (
        [0, 2, 5],
        [5, 6, 7, 8, 9, 9],
        [3, 4, 6],
    )
    assert [usable.ids_of(index) for index in range(3)] == [(5, 6, 7), (8,), (9, 9)]
    assert [usable.grids_of(index) for index in range(3)] == [((1, 2, 4),), (), ((1, 2, 2), (1, 6, 4))]
    held = (usable.rows, usable.ids, usable.id_ends, usable.grids, usable.grid_ends)
    assert sum(array.nbytes for array in held) == 6 * 4 + (3 + 3 + 3 * 3 + 3) * 8


def test_another_key_finds_nothing(tmp_path: Path) -> None:
    RowCache(tmp_path, "a" * 64).save(CHECKED)
    assert RowCache(tmp_path, "b" * 64).load() is None
    assert RowCache(tmp_path, "a" * 32 + "b" * 32).load() is None, "of the same file name"


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, "a" * 64)
    cache.save(CHECKED)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 97)]
    with np.load(path) as arrays:
        stored = {name: arrays[name] for name in arrays.files}
    for at in range(0, len(whole), 11):
        damaged.append(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        found = cache.load()
        assert found is None or plain(found) == plain(CHECKED), "a bit that no reader looks at"
    for name in ("rows", "ids", "id_ends", "grids", "grid_ends"):
        np.savez(path, **{**stored, name: stored[name][:-1]})
        assert cache.load() is None, name


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    RowCache(tmp_path / "file" / "kept", "a" * 64).save(CHECKED)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for number in range(34):
        RowCache(tmp_path, f"{number:064d}"[::-1]).save(CHECKED)
    assert len(list(tmp_path.iterdir())) == 32
    assert RowCache(tmp_path, f"{33:064d}"[::-1]).load() is not None


def test_a_file_is_known_by_more_than_its_date(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text("one")
    before, times = file_identity([file]), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert file_identity([file]) == before
    file.write_text("two")
    os.utime(file, ns=times)
    assert file.stat().st_mtime_ns == times[1] and file_identity([file]) != before


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": 1, "b": None}, {"a": "1"}])
def test_keys_differ_by_every_part(other: dict[str, Any]) -> None:
    assert fingerprint_of({"a": 1}) != fingerprint_of(other)
    assert fingerprint_of(json.loads('{"y": 1, "x": 2}')) == fingerprint_of({"x": 2, "y": 1})
