"""Image questions of a data set, by random access: files, folders, `save_to_disk` folders and hub ids.

A row is (problem, answer, images), and may have a system turn of its own. A call reads only what it needs: a text is
read without image bytes, an image's size comes from its header, and only `image()` decodes pixels. Every fault of a row
is a RowError with file and row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from megatron_vppo.config.choices import ImagePlace
from megatron_vppo.data.columns import DATA_SOURCE, EXTRA_INFO, Column, Columns, RowExtras
from megatron_vppo.data.conversation import (
    BadTurns,
    Conversation,
    TurnTags,
    is_conversation,
    read_turns,
    tags_of_file,
)
from megatron_vppo.data.decode import check_complete, decode, has_transparent_pixels, upright_size
from megatron_vppo.data.rows import BadRow, DataRows
from megatron_vppo.data.sources import open_source

IMAGE_MARK = "<image>"
"""The place of an image in a problem."""
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
        columns: Columns,
        numbers: range | None = None,
        tags: TurnTags | None = None,
    ) -> None:
        """
        Args:
            source: the name of the data set in messages.
            image_root: the folder that relative image paths are taken from.
            numbers: the numbers of the rows that are used, in the file; None: all.
            tags: the names that turns have, where problems are conversations; None: the usual ones.
        """
        self.source = source
        self._rows = rows
        self._image_root = image_root
        self._columns, self._tags = columns, tags
        self._numbers = range(len(rows)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def has_image_column(self) -> bool:
        """False if no row has images, because there is no column of them."""
        return self._columns.images is not None

    def selection(self) -> dict[str, Any]:
        """Returns, for JSON, what of its files it uses: columns, rows, and the folder of images."""
        numbers = self._numbers
        return {
            "source": self.source,
            "columns": dataclasses.asdict(self._columns),
            "tags": None if self._tags is None else dataclasses.asdict(self._tags),
            "numbers": [numbers.start, numbers.stop, numbers.step],
            "image_root": str(self._image_root),
        }

    def error(self, row: int, reason: str) -> RowError:
        """Builds the error of a row."""
        return RowError(self.source, row, reason, self._rows.place(self._numbers[row]))

    def problem(self, row: int) -> str:
        """Returns the problem's text: that of the cell, or the user's turn of a conversation.

        Raises RowError if it is missing, empty, not a text or not Unicode, or if the turns are not one question.
        """
        value = self._cell(row, self._columns.problem)
        if is_conversation(value):
            value = self._turns(row, value).question
        if not isinstance(value, str) or not value.strip():
            raise self.error(row, f"column {self._columns.problem.name!r} holds no text: {value!r}")
        if self._columns.image_place == "first" and IMAGE_MARK not in value:
            value = IMAGE_MARK * len(self.image_cells(row)) + value
        return self._whole_text(row, self._columns.problem.name, value)

    def system(self, row: int) -> str | None:
        """Returns the system turn of a row that is a conversation; None if it has none. Raises RowError."""
        value = self._cell(row, self._columns.problem)
        turn = self._turns(row, value).system if is_conversation(value) else None
        return None if turn is None else self._whole_text(row, self._columns.problem.name, turn)

    def answer(self, row: int) -> str:
        """Returns the answer as text, also if it is a number or a date. Raises RowError if it is missing or empty.

        Without a column of answers it is that of the conversation, see `Conversation`.
        """
        column = self._columns.answer or self._columns.problem
        value = self._cell(row, column)
        if self._columns.answer is None and is_conversation(value):
            value = self._turns(row, value).answer
        if not isinstance(value, str | int | float | Decimal | date | time) or not str(value).strip():
            raise self.error(row, f"column {column.name!r} holds no answer: {str(value)[:80]!r}")
        return self._whole_text(row, column.name, str(value))

    def extras(self, row: int) -> RowExtras:
        """Returns what the row has for reward functions, in columns of verl's names. Raises RowError."""
        return RowExtras(*(self._stored(row, name) for name in (DATA_SOURCE, EXTRA_INFO)))

    def _stored(self, row: int, name: str) -> Any:
        if name not in self._rows.columns:
            return None
        try:
            return self._rows.as_stored(self._numbers[row], name)
        except BadRow as error:
            raise self.error(row, f"column {name!r}: {error}") from error

    def _turns(self, row: int, cell: Any) -> Conversation:
        try:
            return read_turns(cell, self._tags)
        except BadTurns as error:
            raise self.error(row, f"column {self._columns.problem.name!r}: {error}") from error

    def _whole_text(self, row: int, column: str, text: str) -> str:
        """Returns the text. Raises RowError for half of a surrogate pair, which no tokenizer takes."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(row, f"column {column!r} holds half of a character: {error}") from error
        return text

    def image_cells(self, row: int) -> list[Any]:
        """Returns the row's images as they are stored: paths, bytes or {'bytes', 'path'}."""
        cell = None if self._columns.images is None else self._cell(row, self._columns.images)
        if cell is None:
            return []
        return list(cell) if isinstance(cell, (list, tuple)) else [cell]

    def image_bytes(self, row: int, index: int) -> bytes:
        """Reads the encoded image. Raises RowError if there is none, or its file is missing or cannot be read."""
        cells = self.image_cells(row)
        if index >= len(cells):
            raise self.error(row, f"image {index} asked for, there are {len(cells)}")
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

    def _cell(self, row: int, column: Column) -> Any:
        try:
            return self._rows.cell(self._numbers[row], column.top, column.inside)
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
    image_place: ImagePlace,
    image_dir: str | None = None,
    max_rows: int | None = None,
) -> VisionDataset:
    """Opens `path`, `path@split` or `repo@split` (see `open_source`).

    Args:
        problem_key, answer_key, image_key: names of the columns, or of fields in them, see `Column.of`.
        image_place: the place of images in a problem that has no mark of them.
        image_dir: the folder that relative image paths are taken from; None: that of the data file.
        max_rows: the number of rows that are used, from the first; None: all.

    Raises:
        ValueError: as `open_source`; or a column is missing, and the message has the columns that there are.
    """
    opened = open_source(source)
    rows = opened.rows
    if not rows.columns:
        _refuse_rows_without_columns(rows, source)
    problem, answer, images = (Column.of(key, rows.columns) for key in (problem_key, answer_key, image_key))
    missing = {
        "prompt_key": problem.top not in rows.columns,
        "answer_key": answer.top not in rows.columns and not _are_conversations(rows, problem),
        "image_key": images.top not in rows.columns and bool(_image_columns(rows, (problem.top, answer.top))),
    }
    for setting, column in (("prompt_key", problem), ("answer_key", answer), ("image_key", images)):
        if missing[setting]:
            known = ", ".join(rows.columns)
            raise ValueError(f"{source}: no column {column.name!r}; it has {known}. Set data.{setting} to one of them.")
    return VisionDataset(
        rows,
        source=source,
        image_root=(Path(image_dir) if image_dir is not None else opened.image_root).absolute(),
        columns=Columns(
            problem,
            answer if answer.top in rows.columns else None,
            images if images.top in rows.columns else None,
            image_place,
        ),
        numbers=opened.numbers[:max_rows],
        tags=None if opened.file is None else tags_of_file(opened.file),
    )


def _are_conversations(rows: DataRows, column: Column) -> bool:
    """Returns True if the first value of a column is a list of turns."""
    return next((is_conversation(value) for value in _first_values(rows, column)), False)


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
    for name in rows.columns:
        if name in others:
            continue
        for value in _first_values(rows, Column(name)):
            is_path = isinstance(value, str) and value.lower().endswith(_IMAGE_SUFFIXES)
            is_record = isinstance(value, dict) and bool({"bytes", "path"} & value.keys())
            if is_path or is_record or isinstance(value, list | bytes):
                found.append(name)
            break
    return found


def _first_values(rows: DataRows, column: Column) -> Iterator[Any]:
    """Yields the values of the first rows that can be read and have one."""
    for row in range(min(len(rows), _ROWS_LOOKED_AT)):
        try:
            value = rows.cell(row, column.top, column.inside)
        except BadRow:
            continue
        if value is not None:
            yield value
