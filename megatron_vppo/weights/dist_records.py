"""The records in the .distcp files of a distributed checkpoint: one archive of torch.save per stored piece.

The archives are zip files with a checksum for each of their parts, which torch never looks at when it loads one. A
record is checked without reading its values twice: its table of contents and its headers always, and the checksums of
the parts that are small. A large tensor's values are its only large part. So of the damage within one, only what
changes its length or its headers is found.
"""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_vppo.weights.dist_metadata import DamagedCheckpoint, naming, one_line

SMALL_BYTES = 1 << 20
"""The size up to which a part of a record is read, for its checksum."""


def check_records(dist_ckpt: Path, metadata: Metadata, keys: Collection[str] | None = None) -> None:
    """Checks that every record is a whole archive of what the description says, as far as that costs little.

    Args:
        metadata: the description that `read_metadata` returned, by which all files are there and long enough.
        keys: the tensors and objects to look at; None: all.

    Raises:
        DamagedCheckpoint: one is not; names it and its file.
    """
    tensors = {
        MetadataIndex(key, chunk.offsets): torch.empty(chunk.sizes, dtype=stored.properties.dtype, device="meta")
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
        for chunk in stored.chunks
    }
    by_file: dict[str, list[tuple[MetadataIndex, Any]]] = defaultdict(list)
    for index, info in metadata.storage_data.items():
        if keys is None or index.fqn in keys:
            by_file[info.relative_path].append((index, info))
    for name, records in by_file.items():
        path = dist_ckpt / name
        with naming(path), path.open("rb") as file:
            for index, info in sorted(records, key=lambda record: record[1].offset):
                record = _Slice(file, start=info.offset, length=info.length)
                try:
                    _check_archive(record)
                    if index in tensors:
                        _check_tensor(record, tensors[index])
                except Exception as error:  # whatever bytes are there: zipfile and torch.load may raise anything
                    raise DamagedCheckpoint(f"{index.fqn} in {path} cannot be read: {one_line(error)}") from error


def _check_archive(record: _Slice) -> None:
    with zipfile.ZipFile(record) as archive:
        for part in archive.infolist():
            with archive.open(part) as content:  # reads its header
                if part.file_size <= SMALL_BYTES:
                    content.read()  # up to the end, where the checksum is compared


def _check_tensor(record: _Slice, expected: torch.Tensor) -> None:
    record.seek(0)
    stored = torch.load(io.BufferedReader(record), map_location="meta", weights_only=True)  # reads no values
    if (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
        raise ValueError(
            f"it is {stored.dtype} of shape {tuple(stored.shape)}, .metadata says {expected.dtype} of "
            f"{tuple(expected.shape)}"
        )


class _Slice(io.RawIOBase):
    """A range of bytes of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, *, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"there are no bytes {-(base + offset)} before the record")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        wanted = min(len(buffer), max(0, self._length - self._at))
        found = self._file.read(wanted)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
