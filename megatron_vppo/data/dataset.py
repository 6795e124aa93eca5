"""Rows of image questions, by random access: parquet, JSON lines, folders, `save_to_disk` folders and hub ids.

A row is (problem, answer, images). A call reads only what it needs: a text is read without image bytes, an image's size
comes from its header, and only `image()` decodes pixels. Every fault of a row is a RowError with file and row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from megatron_vppo.data.decode import check_complete, decode, has_transparent_pixels, upright_size

_FILE_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


class RowError(ValueError):
    """A row of a data set that cannot be used; the message holds the data file, the row index and the reason."""

    def __init__(self, source: str, row: int, reason: str) -> None:
        super().__init__(f"{source}, row {row}: {reason}")
        self.source, self.row, self.reason = source, row, reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, int, str]]:
        return RowError, (self.source, self.row, self.reason)


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
        self, table: datasets.Dataset, *, source: str, image_root: Path, columns: tuple[str, str, str]
    ) -> None:
        """
        Args:
            source: the name of the data set in messages.
            image_root: the folder that relative image paths are taken from.
            columns: the names of the problems, answers and images. A cell of images holds a path, a {'bytes', 'path'}
                or an Image feature of `datasets`, or a list of them.
        """
        problem_key, answer_key, image_key = columns
        self.source = source
        self._image_root = image_root
        self._columns = columns
        self._texts = table.select_columns(list(dict.fromkeys((problem_key, answer_key))))
        images = table.select_columns([image_key])
        # The Image feature would decode on access; its Arrow storage is the {'bytes', 'path'} that we want.
        self._images = images.with_format("arrow") if _holds_images(table.features[image_key]) else images

    def __len__(self) -> int:
        return len(self._texts)

    def problem(self, row: int) -> str:
        """Returns the problem's text. Raises RowError if it is missing, empty or not a text."""
        value = self._texts[row][self._columns[0]]
        if not isinstance(value, str) or not value.strip():
            raise RowError(self.source, row, f"column {self._columns[0]!r} holds no text: {value!r}")
        return value

    def answer(self, row: int) -> str:
        """Returns the answer as text, also if it is a number. Raises RowError if it is missing or empty."""
        value = self._texts[row][self._columns[1]]
        if not isinstance(value, (str, int, float)) or not str(value).strip():
            raise RowError(self.source, row, f"column {self._columns[1]!r} holds no answer: {value!r}")
        return str(value)

    def image_cells(self, row: int) -> list[Any]:
        """Returns the row's images as they are stored: paths or {'bytes', 'path'}."""
        record = self._images[row]
        record = record if isinstance(record, dict) else record.to_pylist()[0]
        cell = record[self._columns[2]]
        if cell is None:
            return []
        return list(cell) if isinstance(cell, (list, tuple)) else [cell]

    def image_bytes(self, row: int, index: int) -> bytes:
        """Reads the encoded image. Raises RowError if there is none, or its file is missing or cannot be read."""
        cells = self.image_cells(row)
        if index >= len(cells):
            raise RowError(self.source, row, f"image {index} asked for, {len(cells)} in column {self._columns[2]!r}")
        cell = cells[index]
        path = cell
        if isinstance(cell, dict):
            if cell.get("bytes") is not None:
                return bytes(cell["bytes"])
            path = cell.get("path")
        if not isinstance(path, str) or not path:
            raise RowError(self.source, row, f"image {index} is neither a path nor bytes: {str(cell)[:80]!r}")
        try:
            return (self._image_root / path).read_bytes()
        except OSError as error:
            reason = f"image {index} cannot be read: {error.strerror}: {self._image_root / path}"
            raise RowError(self.source, row, f"{reason} (relative paths are taken from data.image_dir)") from error

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
            raise RowError(
                self.source, row, f"image {index} is unreadable or truncated: {type(error).__name__}: {error}"
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
        table, root = _load_local(path, parsed.split)
    else:
        table, root = datasets.load_dataset(parsed.location, split=parsed.split), Path.cwd()
    for key, setting in ((problem_key, "prompt_key"), (answer_key, "answer_key"), (image_key, "image_key")):
        if key not in table.column_names:
            known = ", ".join(table.column_names)
            raise ValueError(f"{source}: no column {key!r}; it has {known}. Set data.{setting} to one of them.")
    if max_rows is not None and max_rows < len(table):
        table = table.select(range(max_rows))
    root = Path(image_dir) if image_dir is not None else root
    return VisionDataset(table, source=source, image_root=root.absolute(), columns=(problem_key, answer_key, image_key))


def check_source(source: str) -> Source:
    """Splits a source into its parts. Raises ValueError for a path that does not exist; hub ids are not looked up."""
    parsed = parse_source(source)
    path = Path(parsed.location)
    is_path = path.is_absolute() or path.suffix in _FILE_READERS or parsed.location.startswith(".")
    if is_path and not path.exists():
        raise ValueError(f"data source {source!r}: {path.absolute()} does not exist")
    return parsed


def _load_local(path: Path, split: str) -> tuple[datasets.Dataset, Path]:
    """Opens a path: returns the rows, and the folder that their relative image paths start from."""
    if path.is_file():
        return _load_file(path, split), path.parent
    if (path / "dataset_dict.json").exists():
        path = path / split
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path)), path
    if not any(path.glob("metadata.*")):
        for suffix in _FILE_READERS:
            named = path / f"{split.split('[')[0]}{suffix}"
            if named.is_file():
                return _load_file(named, split), path
    return datasets.load_dataset(str(path), split=split), path


def _load_file(path: Path, split: str) -> datasets.Dataset:
    reader = _FILE_READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"data source {path}: unknown kind of file; use one of {', '.join(_FILE_READERS)} or a folder")
    return datasets.load_dataset(reader, data_files={split.split("[")[0]: str(path)}, split=split)


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or isinstance(getattr(feature, "feature", None), datasets.Image)
