"""The rows of a data file, by random access: JSON lines, JSON, parquet, and tables of `datasets`.

Local files are read here and not by `datasets`, which takes a path for a pattern, guesses the type of a column from its
first values, and keeps a copy by the time of the file's last change. What is read is the file that was named, as it is
now, with its text as text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_vppo.system.whole import whole_file

_BATCH_ROWS = 256


class BadRow(ValueError):
    """A row that cannot be read, such as a line that is not JSON."""


class DataRows(Protocol):
    """The rows of one file or table. Picklable: a copy in another process maps the same files again."""

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""

    def __len__(self) -> int: ...

    def cell(self, row: int, column: str) -> Any:
        """Returns a value as Python has it; None if the row has none. Raises BadRow if the row cannot be read."""

    def line(self, row: int) -> int | None:
        """Returns the number of the row's line in the file, from 1; None if the file has no lines."""


def read_file(path: Path) -> DataRows:
    """Opens a parquet, JSON-lines or JSON file, by its suffix. Raises ValueError for a damaged file."""
    if path.suffix == ".parquet":
        return ArrowRows.of_parquet(path)
    text = path.read_bytes()[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    return JsonRows(path) if path.suffix == ".json" and text.startswith(b"[") else JsonLines(path)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _parse(text: bytes | str) -> Any:
    """Parses JSON with numbers as the text that they are written as. Raises BadRow."""
    try:
        return json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise BadRow(f"not valid JSON: {error}") from error


class JsonLines:
    """A file with one JSON object per line; blank lines are skipped. A line is parsed when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = _mapped(path)
        newlines = np.flatnonzero(np.frombuffer(self._bytes, dtype=np.uint8) == ord("\n"))
        begins = np.concatenate([[0], newlines + 1])
        ends = np.concatenate([newlines, [len(self._bytes)]])
        kept = [n for n, (a, b) in enumerate(zip(begins, ends, strict=True)) if self._bytes[a:b].strip()]
        self._lines: NDArray[np.int64] = np.array(kept, dtype=np.int64)
        self._begins, self._ends = begins[self._lines], ends[self._lines]
        self.columns = self._names()

    def __len__(self) -> int:
        return len(self._lines)

    def cell(self, row: int, column: str) -> Any:
        return self._object(row).get(column)

    def line(self, row: int) -> int | None:
        return int(self._lines[row]) + 1

    def _object(self, row: int) -> dict[str, Any]:
        text = self._bytes[self._begins[row] : self._ends[row]]
        found = _parse(text.removeprefix(codecs.BOM_UTF8) if row == 0 else text)
        if not isinstance(found, dict):
            raise BadRow(f"a line holds one JSON object, and this one holds {type(found).__name__}")
        return found

    def _names(self) -> tuple[str, ...]:
        """Collects the names of all objects; damaged lines are named later, by row."""
        names: dict[str, None] = {}
        for row in range(len(self)):
            try:
                names.update(dict.fromkeys(self._object(row)))
            except BadRow:
                continue
        return tuple(names)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bytes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bytes = _mapped(self._path)


class JsonRows:
    """A JSON file that is one list of objects."""

    def __init__(self, path: Path) -> None:
        try:
            found = _parse(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        except BadRow as error:
            raise ValueError(f"{path} is {error}") from error
        self._objects: list[Any] = found
        self.columns = tuple(dict.fromkeys(name for item in found if isinstance(item, dict) for name in item))

    def __len__(self) -> int:
        return len(self._objects)

    def cell(self, row: int, column: str) -> Any:
        item = self._objects[row]
        if not isinstance(item, dict):
            raise BadRow(f"an entry of the list is one JSON object, and this one is {type(item).__name__}")
        return item.get(column)

    def line(self, row: int) -> int | None:
        return None


def _mapped(path: Path) -> Any:
    """Maps a file into memory; an empty one cannot be mapped."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


# --- Arrow ------------------------------------------------------------------------------------------------------------


class ArrowRows:
    """An Arrow table in a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.columns = tuple(self._table.column_names)

    @classmethod
    def of_parquet(cls, path: Path) -> ArrowRows:
        """Opens a parquet file by way of an uncompressed copy, which alone allows random access.

        The copy is kept in the cache of `datasets`, under the hash of the file's content.

        Raises:
            ValueError: the file is not parquet, or is damaged.
        """
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:40]
        copy = Path(datasets.config.HF_DATASETS_CACHE) / "megatron_vppo" / f"{digest}.arrow"
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                source = pq.ParquetFile(path)
                with whole_file(copy) as target, pa.ipc.new_file(target, source.schema_arrow) as writer:
                    for batch in source.iter_batches(batch_size=_BATCH_ROWS):
                        writer.write_batch(batch)
            except pa.ArrowException as error:
                raise ValueError(f"{path} is not a parquet file, or is damaged: {error}") from error
        return cls(copy)

    def __len__(self) -> int:
        return self._table.num_rows

    def cell(self, row: int, column: str) -> Any:
        return plain_value(self._table.column(column)[row])

    def line(self, row: int) -> int | None:
        return None

    def __reduce__(self) -> tuple[type[ArrowRows], tuple[Path]]:
        return ArrowRows, (self._path,)


class DatasetRows:
    """A table of `datasets`, from the hub or saved by it; images stay encoded."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table.with_format("arrow")
        self.columns = tuple(table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def cell(self, row: int, column: str) -> Any:
        return plain_value(self._table.select_columns([column])[row].column(0)[0])

    def line(self, row: int) -> int | None:
        return None


def plain_value(value: pa.Scalar) -> Any:
    """Returns an Arrow value as Python has it; a floating-point number as the shortest text that its type reads back.

    A float32 0.1 is '0.1', where Python's float would be 0.10000000149011612. A whole number is written without a
    fraction, because integers next to a missing value are stored as floating point.
    """
    found = value.as_py()
    if found is None or not pa.types.is_floating(value.type):
        return found
    text = str(value.type.to_pandas_dtype()(found))
    return text.removesuffix(".0")
