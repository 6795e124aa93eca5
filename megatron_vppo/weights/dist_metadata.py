"""The description of a distributed checkpoint, read without executing anything of it.

Its file `.metadata` is a pickle, which could call any function that it names. Here it may name only the records that
torch.distributed.checkpoint writes there. After this module has read such a file, torch's and Megatron's own readers
may safely read it again.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

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


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_metadata(dist_ckpt: Path) -> Metadata:
    """Reads which tensors a distributed checkpoint holds, and where.

    Raises:
        ValueError: it is not a distributed checkpoint, is incomplete, or its description would execute something.
    """
    _check_backend(dist_ckpt)
    path = dist_ckpt / ".metadata"
    if not path.is_file():
        raise ValueError(f"{dist_ckpt} lacks .metadata: the checkpoint is incomplete")
    with path.open("rb") as file:
        try:
            metadata = _Reader(file).load()
        except Exception as error:  # whatever bytes are there: a broken pickle may raise anything
            raise ValueError(f"{path} is not the description of a checkpoint and was not loaded: {error}") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ValueError(f"{path} is not the description of a checkpoint")
    _check_files(dist_ckpt, metadata)
    return metadata


def _check_backend(dist_ckpt: Path) -> None:
    path = dist_ckpt / "metadata.json"
    if not path.is_file():
        raise ValueError(f"{dist_ckpt} lacks metadata.json: it is not a distributed checkpoint, or an incomplete one")
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not that of a distributed checkpoint") from error
    if backend != BACKEND:
        raise ValueError(f"{path}: format {backend!r} is not supported, only {BACKEND!r} is")


def _check_files(dist_ckpt: Path, metadata: Metadata) -> None:
    """Checks that every file is there, is long enough, and lies in the folder itself."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = dist_ckpt / name
        if Path(name).name != name:
            raise ValueError(f"{dist_ckpt / '.metadata'} names {name}, which is not in the folder")
        if not path.is_file():
            raise ValueError(f"{path} is missing; the checkpoint is incomplete")
        if path.stat().st_size < end:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {end}; the checkpoint is incomplete")


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
