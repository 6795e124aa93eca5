"""The rows of a data file, by random access: parquet, tables of `datasets`, and several files as one.

Local files are read here and not by `datasets`, which takes a path for a pattern, guesses the type of a column from its
first values, and keeps a copy by the time of the file's last change. What is read is the file that was named, as it is
now, with its text as text.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa

from megatron_vppo.data.arrow_copy import copy_of_parquet


class BadRow(ValueError):
    """A row that cannot be read, such as a line that is not JSON."""


class DataRows(Protocol):
    """The rows of one file or table. Picklable: a copy in another process maps the same files again."""

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""

    def __len__(self) -> int: ...

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        """Returns a value as Python has it; None if the row has none. Raises BadRow if the row cannot be read.

        Args:
            inside: names of fields, where the column holds records: ('a', 'b') is the field b of the field a.
        """

    def as_stored(self, row: int, column: str) -> Any:
        """Returns a value with its numbers as numbers; None if the row has none. Raises BadRow as `cell` does."""

    def place(self, row: int) -> str | None:
        """Names where the row is, for messages, if its number does not say it: 'line 3', 'b.jsonl, line 3'."""


class ChainedRows:
    """The rows of several files of a folder, file after file. A column that a file lacks has no values there."""

    def __init__(self, folder: Path, files: Sequence[tuple[Path, DataRows]]) -> None:
        self._names = [str(path.relative_to(folder)) for path, _ in files]
        self._files = [rows for _, rows in files]
        self._begins = list(itertools.accumulate([len(rows) for rows in self._files], initial=0))
        self.columns = tuple(dict.fromkeys(name for rows in self._files for name in rows.columns))

    def __len__(self) -> int:
        return self._begins[-1]

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        number, within = self._find(row)
        rows = self._files[number]
        # A damaged line is reported for any column, also in a file in which no line could be read.
        return rows.cell(within, column, inside) if column in rows.columns or not rows.columns else None

    def as_stored(self, row: int, column: str) -> Any:
        number, within = self._find(row)
        rows = self._files[number]
        return rows.as_stored(within, column) if column in rows.columns else None

    def place(self, row: int) -> str | None:
        number, within = self._find(row)
        return f"{self._names[number]}, {self._files[number].place(within) or f'row {within}'}"

    def _find(self, row: int) -> tuple[int, int]:
        """Returns the number of the file, and of the row in it. Files without rows are passed over."""
        number = bisect.bisect_right(self._begins, row) - 1
        return number, row - self._begins[number]


class ImageRows:
    """The rows of a folder of images, of which each names its file: column `file_name` becomes `image`, as in
    `datasets`.
    """

    def __init__(self, rows: DataRows) -> None:
        self._rows = rows
        self.columns = tuple("image" if name == "file_name" else name for name in rows.columns)

    def __len__(self) -> int:
        return len(self._rows)

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        return self._rows.cell(row, "file_name" if column == "image" else column, inside)

    def as_stored(self, row: int, column: str) -> Any:
        return self._rows.as_stored(row, column)

    def place(self, row: int) -> str | None:
        return self._rows.place(row)


# --- Arrow ------------------------------------------------------------------------------------------------------------


class ArrowRows:
    """An Arrow table in a memory-mapped file of the stream format."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.columns = tuple(self._table.column_names)

    @classmethod
    def of_parquet(cls, path: Path) -> ArrowRows:
        """Opens a parquet file by way of an uncompressed copy. Raises ValueError as `copy_of_parquet`."""
        return cls(copy_of_parquet(path))

    def __len__(self) -> int:
        return self._table.num_rows

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        return plain_value(_field_of(self._table.column(column)[row], inside))

    def as_stored(self, row: int, column: str) -> Any:
        return _stored_value(self._table.column(column)[row])

    def place(self, row: int) -> str | None:
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

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        return plain_value(_field_of(self._value(row, column), inside))

    def as_stored(self, row: int, column: str) -> Any:
        return _stored_value(self._value(row, column))

    def _value(self, row: int, column: str) -> pa.Scalar:
        return self._table.select_columns([column])[row].column(0)[0]

    def place(self, row: int) -> str | None:
        return None


def _field_of(value: pa.Scalar, inside: Sequence[str]) -> pa.Scalar:
    """Returns a field of a record, or of one inside it; no value if there is none of that name."""
    for name in inside:
        has_it = isinstance(value, pa.StructScalar) and value.is_valid and value.type.get_field_index(name) >= 0
        value = value[name] if has_it else pa.scalar(None)
    return value


def _stored_value(value: pa.Scalar) -> Any:
    """Returns an Arrow value as Python has it. Raises BadRow for one that Python does not have."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 text: {error}") from error
    except (ValueError, OverflowError) as error:  # two fields of a name, a date out of range
        raise BadRow(f"a value that cannot be read: {error}") from error


def plain_value(value: pa.Scalar) -> Any:
    """Returns an Arrow value as Python has it; a floating-point number as the shortest text that its type reads back.

    A float32 0.1 is '0.1', where Python's float would be 0.10000000149011612. A whole number is written without a
    fraction, because integers next to a missing value are stored as floating point.

    Raises BadRow for a value that Python does not have, such as text that is not UTF-8.
    """
    found = _stored_value(value)
    if found is None or not pa.types.is_floating(value.type):
        return found
    if found != found:  # NaN, as pandas writes a missing number
        return None
    text = str(value.type.to_pandas_dtype()(found))
    return text.removesuffix(".0")
