"""Encoded images that cannot be read are errors with their place."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vppo.data.rows import BadRow
from megatron_vppo.data.sources import read_file
from megatron_vppo.evaluation.encoded import CellImage, FileImage, ZipImage
from tests.evaluation.sources.copies import png, write_parquet


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no archive")
    write_parquet(tmp_path / "a.parquet", [{"image": "a path"}])
    cell = CellImage(read_file(tmp_path / "a.parquet"), 0, "image", 0, "a.parquet, row 0")
    for image, message in (
        (FileImage(tmp_path / "a.png"), r"a\.png cannot be read"),
        (ZipImage(tmp_path / "a.zip", "x.png"), r"a\.zip:x\.png cannot be read"),
        (cell, r"a\.parquet, row 0: column 'image' holds no image bytes: 'a path'"),
    ):
        with pytest.raises(BadRow, match=message):
            image.read()


def overwrite(data: bytes, *places: int, by: bytes) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place : place + len(by)] = by
    return bytes(changed)


@pytest.mark.parametrize(
    ("compression", "damage"),
    [
        (zipfile.ZIP_DEFLATED, lambda data, _: overwrite(data, 35, by=b"\xff" * 10)),  # zlib.error
        (zipfile.ZIP_LZMA, lambda data, _: overwrite(data, 41, by=b"\xff" * 14)),  # lzma.LZMAError
        (zipfile.ZIP_DEFLATED, lambda data, entry: overwrite(data, 6, entry + 8, by=b"\1")),  # encrypted: RuntimeError
        (zipfile.ZIP_DEFLATED, lambda data, entry: overwrite(data, 8, entry + 10, by=b"c")),  # unknown method
        (zipfile.ZIP_STORED, lambda data, entry: overwrite(data, entry + 20, by=b"\0\0\1\0" * 2)),  # too long: EOFError
    ],
)
def test_a_damaged_member_of_an_archive_is_named(
    tmp_path: Path, compression: int, damage: Callable[[bytes, int], bytes]
) -> None:
    """The member's data begin at byte 35; its entry in the archive's directory repeats its flags, method and sizes."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.png", png("red"))
    data = path.read_bytes()
    path.write_bytes(damage(data, data.rfind(b"PK\1\2")))
    with pytest.raises(BadRow, match=r"a\.zip:x\.png cannot be read: .+"):
        ZipImage(path, "x.png").read()
