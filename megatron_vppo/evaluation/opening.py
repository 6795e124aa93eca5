"""The files of a benchmark, opened: its rows, and where their images are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vppo.config.choices import BenchmarkSource
from megatron_vppo.data.rows import BadRow
from megatron_vppo.data.sources import OpenedSource, open_source, parse_source, splits_of
from megatron_vppo.evaluation.image_places import places_of
from megatron_vppo.evaluation.released import hub_id
from megatron_vppo.evaluation.sources.row import BenchmarkRow

_MEANT = "test"
"""The split that is meant where a path names none, and the folder has it among others."""


class NamedRows:
    """A JSON file that is one object of objects by name; the name is in the column `key` (LogicVista's repository)."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file is anything else."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"), parse_int=str, parse_float=str)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
            raise ValueError(f"{path} is no object of rows by name, such as {{'v1_0': {{'question': ...}}}}")
        self._rows: list[dict[str, Any]] = [{"key": name, **row} for name, row in found.items()]
        self.columns: Sequence[str] = tuple(dict.fromkeys(column for row in self._rows for column in row))

    def __len__(self) -> int:
        return len(self._rows)

    def cell(self, row: int, column: str, inside: Sequence[str] = ()) -> Any:
        """Returns a value; None if the row has none. See DataRows.cell."""
        value: Any = self._rows[row].get(column)
        for name in inside:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def as_stored(self, row: int, column: str) -> Any:
        """Returns a value as `cell` does: questions need no numbers."""
        return self.cell(row, column)

    def place(self, row: int) -> str:
        """Names the row as the file does."""
        return str(self._rows[row]["key"])


def rows_of(benchmark: str, source: BenchmarkSource, path: str, images: str | None) -> tuple[list[BenchmarkRow], bool]:
    """Opens the file or folder of a benchmark.

    Args:
        benchmark: its name.
        path: `path` or `path@split`.
        images: the folder or zip file of its images; None: around its file.

    Returns:
        Its rows, and True if they are all rows of the file: no part of a split was asked for.

    Raises:
        ValueError: there is no such file, it is damaged, or it has no rows.
    """
    parsed = parse_source(path)
    location = Path(parsed.location)
    if not location.exists():
        copied = hub_id(source, path)
        fetch = f": hf download {copied} --repo-type dataset --local-dir FOLDER" if copied else ""
        raise ValueError(
            f"benchmark {benchmark!r}: {location.absolute()} does not exist. Benchmarks are read from local copies"
            f"{fetch}; docs/evaluation.md says more"
        )
    if source == "logicvista" and location.suffix == ".json" and location.is_file():
        named = NamedRows(location)
        opened = OpenedSource(named, location.parent, range(len(named)))
    else:
        try:
            opened = open_source(_with_split(path, parsed.location))
        except BadRow as error:
            raise ValueError(f"benchmark {benchmark!r}: {error}") from error
    places = places_of(location, images)
    rows = [BenchmarkRow(benchmark, path, opened.rows, number, places) for number in opened.numbers]
    return rows, len(opened.numbers) == len(opened.rows)


def _with_split(path: str, location: str) -> str:
    """Adds the split that is meant to the path of a folder.

    Args:
        location: the path without a split; equal to `path` if that names none.
    """
    folder = Path(location)
    if path == location and folder.is_dir() and _MEANT in splits_of(folder):
        return f"{location}@{_MEANT}"
    return path


def numbered(names: Sequence[str]) -> Iterator[str]:
    """Yields each name, and with a number after it if it was there before: 'a', 'b', 'a (2)'. None is there twice."""
    counts: dict[str, int] = {}
    taken: set[str] = set()
    for name in names:
        unique = name
        while unique in taken:
            counts[name] = counts.get(name, 1) + 1
            unique = f"{name} ({counts[name]})"
        taken.add(unique)
        yield unique
