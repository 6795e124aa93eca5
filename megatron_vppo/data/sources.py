"""The sources of a data set: files, folders of files, folders that `datasets` saved, and hub ids; found and opened."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from megatron_vppo.data.json_rows import JsonLines, JsonList
from megatron_vppo.data.rows import ArrowRows, ChainedRows, DataRows, DatasetRows, ImageRows

FILE_SUFFIXES = (".parquet", ".jsonl", ".json")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in a file's path that say which split it belongs to, as in `datasets`."""
_IMAGE_ROWS = "metadata.jsonl"
"""The rows of a folder of images, as `datasets` names the file."""
_NO_DATA = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files of a data set's folder that describe it."""


@dataclass(frozen=True, slots=True)
class Source:
    """The parts of `path`, `path@split` or `repo@split`."""

    location: str
    """Local path or hub id."""
    split: str
    """Split expression of `datasets`: 'train', 'test', 'train[:1000]', ..."""

    @property
    def split_name(self) -> str:
        return self.split.partition("[")[0]


@dataclass(frozen=True)
class OpenedSource:
    """The rows of a source."""

    rows: DataRows
    image_root: Path
    """The folder that relative image paths are taken from."""
    numbers: range
    """The rows that the split expression leaves."""
    file: Path | None = None
    """The file that all rows are in; None if there are several, or `datasets` reads them."""


def parse_source(text: str) -> Source:
    """Splits off `@split` (default 'train'); a path that exists as written, '@' included, is taken whole."""
    if text and ("@" not in text or Path(text).exists()):
        return Source(text, "train")
    location, _, split = text.rpartition("@")
    if not location or not split:
        raise ValueError(f"data source {text!r}: expected `path`, `path@split` or `repo@split`")
    return Source(location, split)


def check_source(source: str) -> Source:
    """Splits a source into its parts. Raises ValueError for a path that does not exist; hub ids are not looked up."""
    parsed = parse_source(source)
    path = Path(parsed.location)
    is_path = path.is_absolute() or path.suffix.lower() in FILE_SUFFIXES or parsed.location.startswith((".", "~"))
    if is_path and not path.exists():
        raise ValueError(f"data source {source!r}: {path.absolute()} does not exist")
    return parsed


def open_source(source: str) -> OpenedSource:
    """Opens `path`, `path@split` or `repo@split`.

    A path is a parquet, JSON-lines or JSON file, or a folder: one of such files, one made by `save_to_disk`, or one of
    images with a metadata.jsonl or metadata.csv. Any other source is a hub id. Only the last three are read by
    `datasets`.

    Raises:
        ValueError: the path does not exist, a file is damaged, or nothing of the split is there.
    """
    parsed = check_source(source)
    path = Path(parsed.location)
    if path.is_file():
        return _open_file(path, parsed, source)
    if path.exists():
        return _open_folder(path, parsed, source)
    table = datasets.load_dataset(parsed.location, split=parsed.split)
    return _whole(DatasetRows(table), Path.cwd(), source)


def splits_of(folder: Path) -> set[str]:
    """Returns the splits that a folder says it has: those that `datasets` saved, else those that its files name.

    Of the latter, train, validation and test are known.
    """
    if (folder / "dataset_dict.json").exists():
        return {inside.name for inside in folder.iterdir() if inside.is_dir()}
    paths = [str(file.relative_to(folder)) for file in _data_files(folder)]
    return {name for path in paths for name in _splits_named_by(path)}


def read_file(path: Path) -> DataRows:
    """Opens a parquet, JSON-lines or JSON file, by its suffix. Raises ValueError for a damaged file."""
    if path.suffix.lower() == ".parquet":
        return ArrowRows.of_parquet(path)
    with path.open("rb") as file:
        begin = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    return JsonList(path) if begin.startswith(b"[") else JsonLines(path)


def _open_file(path: Path, parsed: Source, source: str) -> OpenedSource:
    """Opens a file, which has one split: 'train', or what its own name says."""
    if parsed.split_name not in ("train", path.stem, *_splits_named_by(path.name)):
        raise ValueError(
            f"data source {source!r}: a file has no split {parsed.split_name!r}; leave out '@{parsed.split}'"
        )
    if path.suffix.lower() not in FILE_SUFFIXES:
        known = ", ".join(FILE_SUFFIXES)
        raise ValueError(f"data source {path}: unknown kind of file; use one of {known} or a folder")
    rows = read_file(path)
    if not len(rows):
        raise ValueError(f"data source {path}: the file has no rows")
    return OpenedSource(rows, path.parent, _numbers(parsed.split, len(rows), source), file=path)


def _open_folder(path: Path, parsed: Source, source: str) -> OpenedSource:
    if (path / "dataset_dict.json").exists():
        path = path / parsed.split_name
        if not path.is_dir():
            found = sorted(folder.name for folder in path.parent.iterdir() if folder.is_dir())
            raise ValueError(f"data source {source!r}: no split {parsed.split_name!r}; it has {', '.join(found)}")
    if (path / "state.json").exists():
        try:
            rows: DataRows = DatasetRows(datasets.load_from_disk(str(path)))
        except Exception as error:  # `datasets` raises whatever it runs into
            raise ValueError(f"data source {source!r}: what is saved by datasets is damaged: {error}") from error
        return OpenedSource(rows, path, _numbers(parsed.split, len(rows), source))
    for folder in (path, path / parsed.split_name):
        if (folder / _IMAGE_ROWS).is_file() and (folder != path or parsed.split_name == "train"):
            rows = ImageRows(read_file(folder / _IMAGE_ROWS))
            return OpenedSource(rows, folder, _numbers(parsed.split, len(rows), source))
    if any(path.glob("metadata.*")):  # of images, in another format
        return _whole(DatasetRows(datasets.load_dataset(str(path), split=parsed.split)), path, source)
    files = _files_of_split(path, parsed.split_name, source)
    rows = read_file(files[0]) if len(files) == 1 else ChainedRows(path, [(file, read_file(file)) for file in files])
    return OpenedSource(rows, path, _numbers(parsed.split, len(rows), source))


def _files_of_split(folder: Path, split: str, source: str) -> list[Path]:
    """Finds the data files of a split, in the order of their paths.

    The words in a path name its split (`train-00000-of-00002.parquet`, `test/a.jsonl`). If no path names one, all files
    are those of 'train'.
    """
    files = sorted(_data_files(folder))
    if not files:
        raise ValueError(f"data source {source!r}: the folder holds no {', '.join(FILE_SUFFIXES)} file")
    named = {file: _splits_named_by(str(file.relative_to(folder))) for file in files}
    if not any(named.values()):
        named = {file: {"train"} for file in files}
    wanted = {name for name, words in _SPLIT_WORDS.items() if split == name or split in words} or {split}
    found = [file for file in files if named[file] & wanted]
    if not found:
        splits = ", ".join(sorted({name for names in named.values() for name in names}))
        raise ValueError(f"data source {source!r}: no file of the split {split!r}; the files are those of {splits}")
    return found


def _data_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        inside = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if file.suffix.lower() in FILE_SUFFIXES and not is_hidden and file.name not in _NO_DATA and file.is_file():
            yield file


def _splits_named_by(path: str) -> set[str]:
    words = set(re.split(r"[^a-z]+", path.lower()))
    return {name for name, known in _SPLIT_WORDS.items() if words & set(known)}


def _whole(rows: DataRows, image_root: Path, source: str) -> OpenedSource:
    if not len(rows):
        raise ValueError(f"data source {source!r} has no rows")
    return OpenedSource(rows, image_root, range(len(rows)))


def _numbers(split: str, count: int, source: str) -> range:
    """Applies a split expression of `datasets`, such as 'train[10:20]' or 'train[:5%]', to `count` rows."""
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: count})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"data source {source!r}: {error}") from error
    numbers = range(count)[part.from_ : part.to]
    if not numbers:
        raise ValueError(f"data source {source!r}: the split leaves none of the {count} rows")
    return numbers
