"""A parquet file is hashed once, by one process of a host, and again as soon as it is another."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vppo.data import arrow_copy
from megatron_vppo.data.arrow_copy import copy_of_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "megatron_vppo"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content was hashed. A file counts as settled at once."""
    names: list[str] = []
    real: Callable[..., Any] = hashlib.file_digest
    monkeypatch.setattr(arrow_copy, "SETTLED_SECONDS", 0.0)

    def digest(file: Any, kind: str) -> Any:
        names.append(Path(file.name).name)
        return real(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return names


def write(path: Path, text: str) -> Path:
    """Writes one row. A file that was there has another time of its inode's change afterwards."""
    before = path.stat().st_ctime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_ctime_ns == before:
        pq.write_table(pa.table({"text": [text]}), path)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def text_of(copy: Path) -> str:
    return pa.ipc.open_stream(str(copy)).read_all()["text"][0].as_py()


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    one, two = write(tmp_path / "one.parquet", "first"), write(tmp_path / "two.parquet", "other")
    copies = [[copy_of_parquet(path) for path in (one, two)] for _ in range(3)]
    assert copies[0] == copies[1] == copies[2] and [text_of(copy) for copy in copies[0]] == ["first", "other"]
    assert hashed == ["one.parquet", "two.parquet"]
    link = tmp_path / "link.parquet"
    link.symlink_to(one)
    assert copy_of_parquet(link) == copies[0][0], "the same content needs no second copy"


@pytest.mark.parametrize("way", ["written over", "replaced"])
def test_another_file_of_the_same_size_and_date_is_hashed(tmp_path: Path, hashed: list[str], way: str) -> None:
    path = write(tmp_path / "rows.parquet", "first")
    size = path.stat().st_size
    assert text_of(copy_of_parquet(path)) == "first"
    if way == "written over":
        write(path, "other")
    else:
        write(tmp_path / "new", "other").rename(path)
    assert (path.stat().st_size, path.stat().st_mtime) == (size, 1_700_000_000)
    assert text_of(copy_of_parquet(path)) == "other"
    assert len(hashed) == 2


def test_the_hash_of_a_file_that_has_just_changed_is_not_kept(
    tmp_path: Path, hashed: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change once more before the file system's clock goes on."""
    monkeypatch.setattr(arrow_copy, "SETTLED_SECONDS", 3600.0)
    path = write(tmp_path / "rows.parquet", "first")
    assert copy_of_parquet(path) == copy_of_parquet(path)
    assert len(hashed) == 2 and not list(cache.glob("*.json"))


def test_a_file_that_changes_while_it_is_hashed_is_not_kept(
    tmp_path: Path, hashed: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.parquet", "first")
    real: Callable[..., Any] = hashlib.file_digest

    def change_after(file: Any, kind: str) -> Any:
        found = real(file, kind)
        write(path, "other")
        return found

    monkeypatch.setattr(hashlib, "file_digest", change_after)
    copy_of_parquet(path)
    assert not list(cache.glob("*.json"))


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"file": null}', b"\xff"])
def test_a_damaged_record_counts_as_none(tmp_path: Path, hashed: list[str], cache: Path, damage: bytes) -> None:
    path = write(tmp_path / "rows.parquet", "first")
    copy = copy_of_parquet(path)
    (record,) = cache.glob("*.json")
    kept = json.loads(record.read_text())
    record.write_bytes(damage if damage != b'{"file": null}' else json.dumps({"file": kept["file"]}).encode())
    assert copy_of_parquet(path) == copy and len(hashed) == 2
    assert json.loads(record.read_text()) == kept


def test_a_folder_that_holds_neither_records_nor_locks(tmp_path: Path, hashed: list[str], cache: Path) -> None:
    path = write(tmp_path / "rows.parquet", "first")
    copy = copy_of_parquet(path)
    for found in [*cache.glob("*.json"), *cache.glob("*.lock")]:
        found.unlink()
        found.mkdir()
    assert copy_of_parquet(path) == copy and len(hashed) == 2


def test_of_two_that_open_a_file_one_hashes_it(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hashes until the second is on its way; a lock is held by an open file, so threads are as processes."""
    path, hashing, second_comes = write(tmp_path / "rows.parquet", "first"), threading.Event(), threading.Event()
    real: Callable[..., Any] = hashlib.file_digest
    found: list[Path] = []

    def slow(file: Any, kind: str) -> Any:
        hashing.set()
        second_comes.wait(10.0)
        return real(file, kind)

    def come_second() -> None:
        second_comes.set()
        found.append(copy_of_parquet(path))

    monkeypatch.setattr(hashlib, "file_digest", slow)
    first = threading.Thread(target=lambda: found.append(copy_of_parquet(path)))
    second = threading.Thread(target=come_second)
    first.start()
    assert hashing.wait(10.0)
    second.start()
    for thread in (first, second):
        thread.join()
    assert found[0] == found[1] and hashed == ["rows.parquet"]
