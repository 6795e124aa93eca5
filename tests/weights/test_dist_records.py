"""A stored piece is a whole archive: seen without reading the values of large tensors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, Metadata, save

from megatron_vppo.weights import dist_records
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint, read_metadata
from megatron_vppo.weights.dist_records import SMALL_BYTES, check_records

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # it is not needed here
SMALL, LARGE = "a.small", "b.large"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    folder = tmp_path / "dist_ckpt"
    tensors = {SMALL: torch.arange(6.0), LARGE: torch.arange(SMALL_BYTES / 4 + 1)}
    save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def place_in(metadata: Metadata, key: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def flip(folder: Path, metadata: Metadata, key: str, *, at: int) -> None:
    info = place_in(metadata, key)
    path = folder / info.relative_path
    data = bytearray(path.read_bytes())
    data[info.offset + at] ^= 0xFF
    path.write_bytes(data)


def test_whole_records_pass(stored: Path) -> None:
    check_records(stored, read_metadata(stored))


def test_every_byte_of_the_values_of_a_small_record_counts(stored: Path) -> None:
    metadata = read_metadata(stored)
    info = place_in(metadata, SMALL)
    path = stored / info.relative_path
    data = path.read_bytes()
    record = data[info.offset : info.offset + info.length]
    first = record.index(torch.arange(6.0).numpy().tobytes())
    for at in range(first, first + 24):
        flip(stored, metadata, SMALL, at=at)
        with pytest.raises(DamagedCheckpoint, match=rf"^{SMALL} in {path} cannot be read: Bad CRC-32"):
            check_records(stored, metadata)
        path.write_bytes(data)


def test_a_large_record_is_checked_at_both_ends_only(stored: Path) -> None:
    metadata = read_metadata(stored)
    length = place_in(metadata, LARGE).length
    flip(stored, metadata, LARGE, at=length // 2)
    check_records(stored, metadata)  # what the module says it cannot see
    for at in (0, length - 22):  # the signatures of the first header and of the last
        flip(stored, metadata, LARGE, at=at)
        with pytest.raises(DamagedCheckpoint, match=rf"^{LARGE} in \S+/__0_\d\.distcp cannot be read: "):
            check_records(stored, metadata)
        check_records(stored, metadata, keys={SMALL})
        flip(stored, metadata, LARGE, at=at)


def test_little_of_a_large_record_is_read(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    readinto = dist_records._Slice.readinto

    def counted(self: Any, buffer: Any) -> int:
        nonlocal read
        read += (found := readinto(self, buffer))
        return found

    monkeypatch.setattr(dist_records._Slice, "readinto", counted)
    check_records(stored, read_metadata(stored), keys={LARGE})
    assert 0 < read < 64 * 1024


def test_a_slice_is_a_file_of_its_own() -> None:
    part = dist_records._Slice(io.BytesIO(b"..abcdef.."), start=2, length=6)
    assert part.read() == b"abcdef" and part.read() == b""
    assert part.seek(-2, io.SEEK_END) == 4 and part.read(10) == b"ef"
    with pytest.raises(ValueError, match="no bytes 3 before the record"):
        part.seek(-3)
