"""Image questions of a data set, by random access: files, folders, `save_to_disk` folders and hub ids.

A row is (problem, answer, images). A call reads only what it needs: a text is read without image bytes, an image's size
comes from its header, and only `image()` decodes pixels. Every fault of a row is a RowError with file and row.
"""

from __future__ import annotations

import re
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from megatron_vppo.data.decode import check_complete, decode, has_transparent_pixels, upright_size
from megatron_vppo.data.rows import BadRow, DataRows
from megatron_vppo.data.sources import open_source

_ROWS_LOOKED_AT = 100
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_SHOWN = 300  # letters of a path in a message; it may be an image in base64
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


class RowError(ValueError):
    """A row of a data set that cannot be used; the message holds data set, row, reason and place."""

    def __init__(self, source: str, row: int, reason: str, place: str | None = None) -> None:
        super().__init__(f"{source}, row {row}: {reason}" + ("" if place is None else f" [{place}]"))
        self.source, self.row, self.reason, self.place = source, row, reason, place

    def __reduce__(self) -> tuple[type[RowError], tuple[str, int, str, str | None]]:
        return RowError, (self.source, self.row, self.reason, self.place)


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

    def selection(self) -> dict[str, Any]:
        """Returns, for JSON, what of its files it uses: columns, rows, and the folder of images."""
        numbers = self._numbers
        return {
            "source": self.source,
            "columns": [self._problems, self._answers, self._images],
            "numbers": [numbers.start, numbers.stop, numbers.step],
            "image_root": str(self._image_root),
        }

    def error(self, row: int, reason: str) -> RowError:
        """Builds the error of a row."""
        return RowError(self.source, row, reason, self._rows.place(self._numbers[row]))

    def problem(self, row: int) -> str:
        """Returns the problem's text. Raises RowError if it is missing, empty, not a text or not Unicode."""
        value = self._cell(row, self._problems)
        if not isinstance(value, str) or not value.strip():
            raise self.error(row, f"column {self._problems!r} holds no text: {value!r}")
        return self._whole_text(row, self._problems, value)

    def answer(self, row: int) -> str:
        """Returns the answer as text, also if it is a number or a date. Raises RowError if it is missing or empty."""
        value = self._cell(row, self._answers)
        if not isinstance(value, str | int | float | Decimal | date | time) or not str(value).strip():
            raise self.error(row, f"column {self._answers!r} holds no answer: {str(value)[:80]!r}")
        return self._whole_text(row, self._answers, str(value))

    def _whole_text(self, row: int, column: str, text: str) -> str:
        """Returns the text. Raises RowError for half of a surrogate pair, which no tokenizer takes."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(row, f"column {column!r} holds half of a character: {error}") from error
        return text

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
            if isinstance(stored := cell.get("bytes"), bytes):
                return stored
            if stored is not None:
                raise self.error(
                    row,
                    f"image {index} has 'bytes' of type {type(stored).__name__}; JSON holds paths of images, parquet "
                    "paths or bytes",
                )
            path = cell.get("path")
        if not isinstance(path, str) or not path:
            raise self.error(row, f"image {index} is neither a path nor bytes: {str(cell)[:80]!r}")
        if _ADDRESS.match(path):
            raise self.error(
                row, f"image {index} is an address ({path[:80]}); images are read from files: download it first"
            )
        try:
            return (self._image_root / path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            why = getattr(error, "strerror", None) or error
            reason = f"image {index} cannot be read: {why}: {str(self._image_root / path)[:_SHOWN]}"
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
        except UnidentifiedImageError as error:
            why = f"of no type that can be read, it begins with {data[:24]!r}" if data else "empty"
            raise self.error(row, f"image {index} is unreadable or truncated: {why}") from error
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
    """Opens `path`, `path@split` or `repo@split` (see `open_source`).

    Args:
        problem_key, answer_key, image_key: names of the columns.
        image_dir: the folder that relative image paths are taken from; None: that of the data file.
        max_rows: the number of rows that are used, from the first; None: all.

    Raises:
        ValueError: as `open_source`; or a column is missing, and the message has the columns that there are.
    """
    opened = open_source(source)
    rows = opened.rows
    if not rows.columns:
        _refuse_rows_without_columns(rows, source)
    for key, setting in ((problem_key, "prompt_key"), (answer_key, "answer_key"), (image_key, "image_key")):
        if key not in rows.columns and (key != image_key or _image_columns(rows, (problem_key, answer_key))):
            known = ", ".join(rows.columns)
            raise ValueError(f"{source}: no column {key!r}; it has {known}. Set data.{setting} to one of them.")
    return VisionDataset(
        rows,
        source=source,
        image_root=(Path(image_dir) if image_dir is not None else opened.image_root).absolute(),
        columns=(problem_key, answer_key, image_key if image_key in rows.columns else None),
        numbers=opened.numbers[:max_rows],
    )


def _refuse_rows_without_columns(rows: DataRows, source: str) -> None:
    """Raises ValueError with what is wrong with the first row, where no row could be read."""
    try:
        rows.cell(0, "")
    except BadRow as error:
        place = rows.place(0)
        raise ValueError(
            f"data source {source!r}: no row can be read; a file holds one JSON object per line, or one list of them. "
            f"Row 0: {error}" + ("" if place is None else f" [{place}]")
        ) from error
    raise ValueError(f"data source {source!r}: its rows are empty")


def _image_columns(rows: DataRows, others: tuple[str, ...]) -> list[str]:
    """Lists the columns whose first value could be images: a list, bytes, {'bytes', 'path'}, or an image's path."""
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
                is_path = isinstance(value, str) and value.lower().endswith(_IMAGE_SUFFIXES)
                if is_path or isinstance(value, list | bytes | dict):
                    found.append(column)
                break
    return found
