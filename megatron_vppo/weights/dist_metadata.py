"""The description of a distributed checkpoint, read without executing anything of it.

Its file `.metadata` is a pickle, which could call any function that it names. Here it may name only the records that
torch.distributed.checkpoint writes there. After this module has read such a file, torch's and Megatron's own readers
may safely read it again.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_vppo.weights.kinds import Shape, padded_vocabulary

DIST_CKPT = "dist_ckpt"
"""The folder with the weights, in a converted folder and in a training checkpoint."""
BACKEND = "torch_dist"
_DCP = "torch.distributed.checkpoint"
_DTYPES = {"float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
_ALLOWED = {
    f"{_DCP}.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""The names that the pickle may contain, by module: records, and functions that only look something up. Megatron keeps
the plans of its writers in the same file."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete or damaged: no setting makes it usable."""


@contextmanager
def naming(path: Path, *, missing: str | None = None) -> Iterator[None]:
    """Turns a failure of the system to read `path` into a DamagedCheckpoint with its name.

    Args:
        missing: the whole message if the file is not there.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCheckpoint(missing or f"{path} is missing; the checkpoint is incomplete") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_metadata(dist_ckpt: Path) -> Metadata:
    """Reads which tensors a distributed checkpoint holds, and where.

    Raises:
        DamagedCheckpoint: it is not a distributed checkpoint, is incomplete, or its description would execute
            something.
    """
    _check_backend(dist_ckpt)
    path = dist_ckpt / ".metadata"
    with naming(path, missing=f"{dist_ckpt} lacks .metadata: the checkpoint is incomplete"):
        data = path.read_bytes()
    try:
        metadata = _Reader(io.BytesIO(data)).load()
        if not isinstance(metadata, Metadata) or metadata.storage_data is None:
            raise DamagedCheckpoint(f"{path} is not the description of a checkpoint")
        _check_files(dist_ckpt, metadata)
        for key, stored in metadata.state_dict_metadata.items():
            _check_pieces(path, key, stored, metadata)
    except DamagedCheckpoint:
        raise
    except Exception as error:  # whatever bytes are there: a broken pickle, and what came out of it, may raise anything
        reason = one_line(error)
        raise DamagedCheckpoint(
            f"{path} is not the description of a checkpoint and was not loaded: {reason}"
        ) from error
    return metadata


def _check_backend(dist_ckpt: Path) -> None:
    path = dist_ckpt / "metadata.json"
    absent = f"{dist_ckpt} lacks metadata.json: it is not a distributed checkpoint, or an incomplete one"
    with naming(path, missing=absent):
        text = path.read_bytes()
    try:
        backend = json.loads(text)["sharded_backend"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not that of a distributed checkpoint") from error
    if backend != BACKEND:
        raise DamagedCheckpoint(f"{path}: format {backend!r} is not supported, only {BACKEND!r} is")


def _check_files(dist_ckpt: Path, metadata: Metadata) -> None:
    """Checks that every file is there, is long enough, and lies in the folder itself."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = dist_ckpt / name
        if Path(name).name != name:
            raise DamagedCheckpoint(f"{dist_ckpt / '.metadata'} names {name}, which is not in the folder")
        with naming(path):
            size = path.stat().st_size
            path.open("rb").close()  # is it a file, and may it be read?
        if size < end:
            raise DamagedCheckpoint(f"{path} has {size} bytes instead of {end}; the checkpoint is incomplete")


def _check_pieces(path: Path, key: str, stored: object, metadata: Metadata) -> None:
    """Checks that the stored pieces of a tensor are all of it, and that each has its place in a file."""
    if not isinstance(stored, TensorStorageMetadata):
        places = [MetadataIndex(key)]
    else:
        places = [MetadataIndex(key, chunk.offsets) for chunk in stored.chunks]
        held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if held != math.prod(stored.size):
            raise DamagedCheckpoint(f"{path} is damaged: it has {held} of the {math.prod(stored.size)} values of {key}")
    if any(place not in metadata.storage_data for place in places):
        raise DamagedCheckpoint(f"{path} is damaged: it does not say where {key} is")


def place_of(
    dist_ckpt: Path, metadata: Metadata, key: str, offset: Sequence[int], sizes: Sequence[int], *, stacked: int
) -> str:
    """Names a region of a tensor for a message: its key, its layer and the files that hold any of it.

    Args:
        stacked: the number of leading dimensions that count layers.
    """
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    overlapping = [
        chunk
        for chunk in stored.chunks
        if all(a < b + n and b < a + m for a, m, b, n in zip(offset, sizes, chunk.offsets, chunk.sizes, strict=True))
    ]
    files = sorted({metadata.storage_data[MetadataIndex(key, chunk.offsets)].relative_path for chunk in overlapping})
    layer = f" (layer {offset[0]})" if stacked else ""
    return f"{key}{layer} in {', '.join(str(dist_ckpt / file) for file in files)}"


def check_stored(
    dist_ckpt: Path, metadata: Metadata, *, key: str, size: Shape, unpadded_rows: int | None
) -> TensorStorageMetadata:
    """Returns the description of one tensor, after checking it against the model.

    Args:
        key: the name of the tensor in the checkpoint.
        size: the shape of the whole tensor as the model has it.
        unpadded_rows: see `Kind`: such a tensor may have been padded for another number of ranks than the model's.

    Raises:
        ValueError: it is missing, has another shape, or is not stored as weights are.
    """
    found = metadata.state_dict_metadata.get(key)
    if not isinstance(found, TensorStorageMetadata):
        raise ValueError(f"{dist_ckpt} lacks the tensor {key}; does config.json belong to these weights?")
    if unpadded_rows is not None:
        # Written by n tensor-parallel ranks it is padded to a multiple of n, and consists of n blocks of rows.
        rows = {unpadded_rows, padded_vocabulary(unpadded_rows, len(found.chunks))}
        fits = found.size[0] in rows and tuple(found.size[1:]) == size[1:]
        size = (unpadded_rows, *size[1:])
    else:
        fits = tuple(found.size) == size
    if not fits:
        raise ValueError(f"{key} in {dist_ckpt} has shape {tuple(found.size)}, the configuration says {size}")
    if not found.properties.dtype.is_floating_point or found.properties.dtype == torch.float64:
        raise ValueError(
            f"{key} in {dist_ckpt} is stored as {found.properties.dtype}; weights must be float32, bfloat16 or float16"
        )
    return found
