"""The rows of JSON and JSON-lines files, by random access.

A file is mapped into memory, not read into it: only where its rows begin and end is held, and a row is parsed when it
is asked for.
"""

from __future__ import annotations

import array
import codecs
import json
import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vppo.data.rows import BadRow

PIECE_BYTES = 1 << 26
"""The part of a file that is searched for line ends at once."""
Spans = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The bytes at which rows begin, and at which they end."""


class _JsonTexts:
    """Rows that are pieces of a JSON file, one object each."""

    piece: str
    """The name of a piece in messages."""

    def __init__(self, path: Path, spans: Callable[[Any], Spans]) -> None:
        """`spans`: finds where the pieces of a mapped file begin and end, in bytes."""
        self._path = path
        self._bytes = _mapped(path)
        self._begins, self._ends = spans(self._bytes)
        self.columns = self._names()

    def __len__(self) -> int:
        return len(self._begins)

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        value = self._object(row, _loads_as_written).get(column)
        for name in inside:
            value = value.get(name) if isinstance(value, dict) else None
        return _as_written(value)

    def as_stored(self, row: int, column: str) -> Any:
        return self._object(row, json.loads).get(column)

    def _object(self, row: int, loads: Callable[[str], Any]) -> dict[str, Any]:
        text = self._bytes[self._begins[row] : self._ends[row]]
        found = _parse(text.removeprefix(codecs.BOM_UTF8) if row == 0 else text, loads)
        if not isinstance(found, dict):
            raise BadRow(f"{self.piece} holds one JSON object, and this one holds {text.strip()[:40]!r}")
        return found

    def _names(self) -> tuple[str, ...]:
        """Collects the names of all objects; damaged ones are named later, by row."""
        names: dict[str, None] = {}
        for row in range(len(self)):
            try:
                names.update(dict.fromkeys(self._object(row, _loads_as_written)))
            except BadRow:
                continue
        return tuple(names)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bytes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bytes = _mapped(self._path)


class JsonLines(_JsonTexts):
    """A file with one JSON object per line; blank lines are skipped."""

    piece = "a line"

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._filled_lines)

    def _filled_lines(self, data: Any) -> Spans:
        newlines = _newlines(data)
        begins = np.concatenate([[0], newlines + 1])
        ends = np.concatenate([newlines, [len(data)]])
        kept = (n for n, (a, b) in enumerate(zip(begins, ends, strict=True)) if data[a:b].strip())
        self._lines: NDArray[np.int64] = np.fromiter(kept, dtype=np.int64)
        return begins[self._lines], ends[self._lines]

    def place(self, row: int) -> str | None:
        return f"line {self._lines[row] + 1}"


class JsonList(_JsonTexts):
    """A JSON file that is one list of objects. Only where each begins and ends is held in memory."""

    piece = "an entry of the list"

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file is no closed list."""
        try:
            super().__init__(path, entries_of_list)
        except BadRow as error:
            raise ValueError(f"{path} is {error}") from error

    def place(self, row: int) -> str | None:
        return None


# --- Parsing ----------------------------------------------------------------------------------------------------------


_JSON_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)
"""The marks that JSON is structured by: brackets and commas, and texts, in which these mean nothing."""


def entries_of_list(data: Any) -> Spans:
    """Finds where the entries of a JSON list begin and end, in bytes, without parsing them.

    An entry that is damaged inside is found when it is parsed. Raises BadRow if brackets do not match, or if something
    stands behind the list.
    """
    begins, ends = array.array("q"), array.array("q")
    open_marks = bytearray()
    for match in _JSON_MARKS.finditer(data):
        mark, place = data[match.start()], match.start()
        if mark in b"[{":
            open_marks.append(mark)
            if len(open_marks) == 1:
                begins.append(place + 1)
        elif mark in b"]}":
            if not open_marks or mark - open_marks.pop() != 2:
                raise BadRow(f"not valid JSON: a bracket at byte {place} closes nothing")
            if not open_marks:
                ends.append(place)
                if rest := data[place + 1 : place + 41].strip():
                    raise BadRow(f"not valid JSON: behind the list, at byte {place + 1}, stands {rest!r}")
                break
        elif mark in b"," and len(open_marks) == 1:
            ends.append(place)
            begins.append(place + 1)
    if len(ends) < len(begins):
        raise BadRow("not valid JSON: the list has no end")
    if len(begins) == 1 and not data[begins[0] : ends[0]].strip():
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    return np.array(begins, dtype=np.int64), np.array(ends, dtype=np.int64)


def _newlines(data: Any) -> NDArray[np.int64]:
    """Finds the line ends, piece by piece: marks for all bytes of a large file would take its size in memory."""
    values = np.frombuffer(data, dtype=np.uint8)
    pieces = range(0, len(values), PIECE_BYTES)
    found = [np.flatnonzero(values[low : low + PIECE_BYTES] == ord("\n")) + low for low in pieces]
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def _mapped(path: Path) -> Any:
    """Maps a file into memory; an empty one cannot be mapped."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _parse(data: bytes, loads: Callable[[str], Any]) -> Any:
    """Parses JSON. Raises BadRow."""
    try:
        return loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not valid JSON: {error}") from error


def _as_written(value: Any) -> Any:
    """Returns a boolean as JSON writes it, and everything else as it is."""
    return str(value).lower() if isinstance(value, bool) else value


def _loads_as_written(text: str) -> Any:
    """Parses JSON with numbers as the text that they are written as, and NaN as no value."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=_constant)


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name
