"""Encoded images that cannot be read are errors with their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.data.rows import BadRow, read_file
from megatron_vppo.evaluation.encoded import CellImage, FileImage, ZipImage
from tests.evaluation.sources.copies import write_parquet


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
