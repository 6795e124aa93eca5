"""The uncompressed copy of a parquet file, which alone allows random access to its rows.

Copies are kept in the cache of `datasets`, each under the hash of the content that it was made of. The hash that a file
was found to have is kept as well, so that a start need not read the file again to know its copy. It counts as long as
the file's device, inode, size and times are the same. The last of these times, that of the inode's change, cannot be
set: it tells of a file that was written over or replaced even where its size and its date were restored.

Of the processes of a host that open a file at the same time, one hashes and copies it while the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vppo.system.whole import whole_file

SETTLED_SECONDS = 2.0
"""The time since a file's last change after which its hash is kept. A change within the same tick of the file system's
clock would leave the times as they were."""
_BATCH_ROWS, _BATCH_BYTES = 256, 4 << 20
"""The rows that are copied from parquet at once, at most, and about their bytes."""


def copy_of_parquet(path: Path) -> Path:
    """Returns the copy of a parquet file, which it makes if there is none.

    It has Arrow's stream format, since the file format takes only one dictionary for all of a column.

    Raises:
        ValueError: the file is not parquet, or is damaged.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "megatron_vppo"
    # Hosts may share the folder, and have different files under one path.
    name = _hash(f"{socket.gethostname()} {path.absolute()}".encode())
    with _one_at_a_time(folder / f"{name}.lock"):
        copy = folder / f"{_content_hash(path, folder / f'{name}.json')}.arrows"
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _write_copy(path, copy)
    return copy


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Waits until no other process of this host is in such a block; goes on without a lock where there can be none."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(lock.open("wb")), fcntl.LOCK_EX)
        yield


def _content_hash(path: Path, record: Path) -> str:
    """Returns the hash of a file's content: that of the record if the file is still the one that it tells of."""
    with path.open("rb") as file:
        before = _identity(file)
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = json.loads(record.read_text())
            if isinstance(kept, dict) and kept.get("file") == before:
                return str(kept["hash"])
        is_settled = os.fstat(file.fileno()).st_ctime < time.time() - SETTLED_SECONDS
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:40]
        if is_settled and _identity(file) == before:
            with contextlib.suppress(OSError), whole_file(record) as target:
                target.write(json.dumps({"file": before, "hash": digest}).encode())
    return digest


def _identity(file: BinaryIO) -> list[int]:
    stat = os.fstat(file.fileno())
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def _write_copy(path: Path, copy: Path) -> None:
    try:
        # Otherwise pyarrow keeps every part of the file that it has read until the file is closed.
        source = pq.ParquetFile(path, pre_buffer=False, memory_map=True)
        _refuse_doubled(source.schema_arrow.names, path)
        with whole_file(copy) as target, pa.ipc.new_stream(target, source.schema_arrow) as writer:
            fitting = _BATCH_BYTES * source.metadata.num_rows // max(1, path.stat().st_size)
            for batch in source.iter_batches(batch_size=max(1, min(_BATCH_ROWS, fitting))):
                writer.write_batch(batch)
        del source
        pa.default_memory_pool().release_unused()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the file's content
            raise
        raise ValueError(f"{path} is not a parquet file, or is damaged: {error}") from error


def _refuse_doubled(names: Sequence[str], path: Path) -> None:
    """Raises ValueError for a name that several columns have."""
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several columns of the name {doubled[0]!r}; rename or drop all but one")
