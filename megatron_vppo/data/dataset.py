"""Image questions of a data set, by random access: files, folders, `save_to_disk` folders and hub ids.

A row is (problem, answer, images). A call reads only what it needs: a text is read without image bytes, an image's size
comes from its header, and only `image()` decodes pixels. Every fault of a row is a RowError with file and row.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from megatron_vppo.data.decode import check_complete, decode, has_transparent_pixels, upright_size
from megatron_vppo.data.rows import BadRow, DataRows, DatasetRows, read_file

_FILE_SUFFIXES = (".parquet", ".jsonl", ".json")
_ROWS_LOOKED_AT = 100


class RowError(ValueError):
    """A row of a data set that cannot be used; the message holds the data file, the row, the reason and the line."""

    def __init__(self, source: str, row: int, reason: str, line: int | None = None) -> None:
        super().__init__(f"{source}, row {row}: {reason}" + ("" if line is None else f" [line {line}]"))
        self.source, self.row, self.reason, self.line = source, row, reason, line

    def __reduce__(self) -> tuple[type[RowError], tuple[str, int, str, int | None]]:
        return RowError, (self.source, self.row, self.reason, self.line)


@dataclass(frozen=True, slots=True)
class Source:
    """The parts of `path`, `path@split` or `repo@split`."""

    location: str
    """Local path or hub id."""
    split: str
    """Split expression of `datasets`: 'train', 'test', 'train[:1000]', ..."""


def parse_source(text: str) -> Source:
    """Splits off `@split` (default 'train'); a path that exists as written, '@' included, is taken whole."""
    if "@" not in text or Path(text).exists():
        return Source(text, "train")
    location, split = text.rsplit("@", 1)
    if not location or not split:
        raise ValueError(f"data source {text!r}: expected `path`, `path@split` or `repo@split`")
    return Source(location, split)


class VisionDataset:
    """The rows of a data set, by index. Picklable: a copy in another process maps the same files again."""

    def __init__(
        self,
        rows: DataRows,
        *,
        source: str,
        image_root: Path,
        columns: tuple[str, str, str | None],
        numbers: range | None = None,
    ) -> None:
        """
        Args:
            source: the name of the data set in messages.
            image_root: the folder that relative image paths are taken from.
            columns: the names of the problems, answers and images. A cell of images holds a path, encoded bytes or a
                {'bytes', 'path'}, or a list of them. None: no row has images.
            numbers: the numbers of the rows that are used, in the file; None: all.
        """
        self.source = source
        self._rows = rows
        self._image_root = image_root
        self._problems, self._answers, self._images = columns
        self._numbers = range(len(rows)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def has_image_column(self) -> bool:
        """False if no row has images, because there is no column of them."""
        return self._images is not None

    def error(self, row: int, reason: str) -> RowError:
        """Builds the error of a row."""
        return RowError(self.source, row, reason, self._rows.line(self._numbers[row]))

    def problem(self, row: int) -> str:
        """Returns the problem's text. Raises RowError if it is missing, empty or not a text."""
        value = self._cell(row, self._problems)
        if not isinstance(value, str) or not value.strip():
            raise self.error(row, f"column {self._problems!r} holds no text: {value!r}")
        return value

    def answer(self, row: int) -> str:
        """Returns the answer as text, also if it is a number or a date. Raises RowError if it is missing or empty."""
        value = self._cell(row, self._answers)
        if not isinstance(value, str | int | float | Decimal | date | time) or not str(value).strip():
            raise self.error(row, f"column {self._answers!r} holds no answer: {str(value)[:80]!r}")
        return str(value)

    def image_cells(self, row: int) -> list[Any]:
        """Returns the row's images as they are stored: paths, bytes or {'bytes', 'path'}."""
        cell = None if self._images is None else self._cell(row, self._images)
        if cell is None:
            return []
        return list(cell) if isinstance(cell, (list, tuple)) else [cell]

    def image_bytes(self, row: int, index: int) -> bytes:
        """Reads the encoded image. Raises RowError if there is none, or its file is missing or cannot be read."""
        cells = self.image_cells(row)
        if index >= len(cells):
            raise self.error(row, f"image {index} asked for, {len(cells)} in column {self._images!r}")
        cell = cells[index]
        path = cell
        if isinstance(cell, bytes):
            return cell
        if isinstance(cell, dict):
            if cell.get("bytes") is not None:
                return bytes(cell["bytes"])
            path = cell.get("path")
        if not isinstance(path, str) or not path:
            raise self.error(row, f"image {index} is neither a path nor bytes: {str(cell)[:80]!r}")
        try:
            return (self._image_root / path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            why = getattr(error, "strerror", None) or error
            reason = f"image {index} cannot be read: {why}: {self._image_root / path}"
            raise self.error(row, f"{reason} (relative paths are taken from data.image_dir)") from error

    def _cell(self, row: int, column: str) -> Any:
        try:
            return self._rows.cell(self._numbers[row], column)
        except BadRow as error:
            raise self.error(row, str(error)) from error

    def image_size(self, row: int, index: int) -> tuple[int, int]:
        """Reads the (width, height) that `image` will have from the header. Raises RowError for an unreadable file."""
        return self._guarded(row, index, upright_size)

    def image(self, row: int, index: int) -> Image.Image:
        """Decodes the image, upright by its EXIF tag, in its own mode. Raises RowError for an unreadable file."""
        return self._guarded(row, index, decode)

    def check_image(self, row: int, index: int) -> tuple[int, int]:
        """Checks that an image is complete and returns its (width, height). Raises RowError for a damaged file.

        PNG files are checked by their checksums, JPEG files by decoding them at an eighth of their size, all others by
        decoding them.
        """
        return self._guarded(row, index, check_complete)

    def is_transparent(self, row: int, index: int) -> bool:
        """Decodes an image and returns True if some pixel is not opaque. Raises RowError for an unreadable file."""
        return self._guarded(row, index, lambda data: has_transparent_pixels(decode(data)))

    def _guarded(self, row: int, index: int, read: Any) -> Any:
        data = self.image_bytes(row, index)
        try:
            return read(data)
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... on broken files
            raise self.error(
                row, f"image {index} is unreadable or truncated: {type(error).__name__}: {error}"
            ) from error


def open_dataset(
    source: str,
    *,
    problem_key: str,
    answer_key: str,
    image_key: str,
    image_dir: str | None = None,
    max_rows: int | None = None,
) -> VisionDataset:
    """Opens `path`, `path@split` or `repo@split` (see parse_source).

    A path is a parquet, JSON-lines or JSON file, or a folder: one made by `save_to_disk`, one that holds
    `SPLIT.parquet` (or .jsonl, .json), or anything that `datasets.load_dataset` understands, such as images next to a
    metadata.jsonl or metadata.csv. Any other source is a hub id.

    Args:
        problem_key, answer_key, image_key: names of the columns.
        image_dir: the folder that relative image paths are taken from; None: that of the data file.
        max_rows: the number of rows that are used, from the first; None: all.

    Raises:
        ValueError: the path does not exist, or a column is missing; the message has the columns that there are.
    """
    parsed = check_source(source)
    path = Path(parsed.location)
    if path.exists():
        rows, root, split = _open_local(path, parsed.split)
    else:
        rows, root, split = DatasetRows(datasets.load_dataset(parsed.location, split=parsed.split)), Path.cwd(), None
    for key, setting in ((problem_key, "prompt_key"), (answer_key, "answer_key"), (image_key, "image_key")):
        if key not in rows.columns and (key != image_key or _image_columns(rows, (problem_key, answer_key))):
            known = ", ".join(rows.columns)
            raise ValueError(f"{source}: no column {key!r}; it has {known}. Set data.{setting} to one of them.")
    numbers = range(len(rows)) if split is None else _numbers(split, len(rows), source)
    return VisionDataset(
        rows,
        source=source,
        image_root=(Path(image_dir) if image_dir is not None else root).absolute(),
        columns=(problem_key, answer_key, image_key if image_key in rows.columns else None),
        numbers=numbers[:max_rows],
    )


def check_source(source: str) -> Source:
    """Splits a source into its parts. Raises ValueError for a path that does not exist; hub ids are not looked up."""
    parsed = parse_source(source)
    path = Path(parsed.location)
    is_path = path.is_absolute() or path.suffix in _FILE_SUFFIXES or parsed.location.startswith(".")
    if is_path and not path.exists():
        raise ValueError(f"data source {source!r}: {path.absolute()} does not exist")
    return parsed


def _open_local(path: Path, split: str) -> tuple[DataRows, Path, str | None]:
    """Opens a path.

    Returns:
        The rows, the folder that their relative image paths start from, and the split expression that is still to be
        applied, if there is one.
    """
    if path.is_file():
        return _open_file(path), path.parent, split
    if (path / "dataset_dict.json").exists():
        path = path / split
    if (path / "state.json").exists():
        return DatasetRows(datasets.load_from_disk(str(path))), path, None
    if not any(path.glob("metadata.*")):
        for suffix in _FILE_SUFFIXES:
            named = path / f"{split.split('[')[0]}{suffix}"
            if named.is_file():
                return _open_file(named), path, split
    return DatasetRows(datasets.load_dataset(str(path), split=split)), path, None


def _open_file(path: Path) -> DataRows:
    if path.suffix not in _FILE_SUFFIXES:
        known = ", ".join(_FILE_SUFFIXES)
        raise ValueError(f"data source {path}: unknown kind of file; use one of {known} or a folder")
    rows = read_file(path)
    if not len(rows):
        raise ValueError(f"data source {path}: the file has no rows")
    return rows


def _numbers(split: str, count: int, source: str) -> range:
    """Applies a split expression of `datasets`, such as 'train[10:20]' or 'train[:5%]', to a file of `count` rows."""
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({split.split("[")[0]: count})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"data source {source!r}: {error}") from error
    return range(count)[part.from_ : part.to]


def _image_columns(rows: DataRows, others: tuple[str, ...]) -> list[str]:
    """Lists the columns whose first value could be images: a list, bytes or {'bytes', 'path'}."""
    found = []
    for column in rows.columns:
        if column in others:
            continue
        for row in range(min(len(rows), _ROWS_LOOKED_AT)):
            try:
                value = rows.cell(row, column)
            except BadRow:
                continue
            if value is not None:
                if isinstance(value, list | bytes | dict):
                    found.append(column)
                break
    return found
