"""Encoded images, read when they are needed: from files, from cells of data files, from zip archives."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_vppo.data.rows import BadRow, DataRows


class EncodedImage(Protocol):
    """An image as it is stored. Picklable: a copy in another process opens the same file again."""

    @property
    def place(self) -> str:
        """The file, and the place in it, for messages."""

    def read(self) -> bytes:
        """Returns the encoded image. Raises BadRow, with its place, if it cannot be read."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image in a file of its own."""

    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise BadRow(f"{self.path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class CellImage:
    """An image whose bytes are in a data file."""

    rows: DataRows
    row: int
    column: str
    index: int
    """The position in the cell's list; 0 for a cell that is no list."""
    place: str

    def read(self) -> bytes:
        value: Any = self.rows.cell(self.row, self.column)
        value = value[self.index] if isinstance(value, list) else value
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadRow(f"{self.place}: column {self.column!r} holds no image bytes: {str(data)[:80]!r}")
        return data


_UNREADABLE = (OSError, zipfile.BadZipFile, KeyError, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"""The errors of `zipfile` for a damaged or missing member; RuntimeError: it is encrypted, or its method is unknown."""


@dataclass(frozen=True, slots=True)
class ZipImage:
    """An image in a zip archive."""

    archive: Path
    member: str

    @property
    def place(self) -> str:
        return f"{self.archive}:{self.member}"

    def read(self) -> bytes:
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return archive.read(self.member)
        except _UNREADABLE as error:
            raise BadRow(f"{self.place} cannot be read: {str(error) or type(error).__name__}") from error
