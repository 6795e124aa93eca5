"""The writing of a Hugging Face folder: files are laid out first, with header and full length, and then filled in.

Several processes can fill them in, each its own parameters. Imports no Megatron, so that these processes are small and
start soon.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vppo.conversion.dist_reader import StoredWeights
from megatron_vppo.conversion.places import StoredEntry, rows_by_tensor
from megatron_vppo.conversion.read_ahead import PIECE_BYTES, read_ahead
from megatron_vppo.conversion.workers import OnBytes
from megatron_vppo.weights.hf_folder import DTYPES, FileTensor, shard_name, write_index
from megatron_vppo.weights.kinds import Shape, merge

ALIGNMENT = 8
"""The first tensor of a safetensors file begins at a multiple of this many bytes."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class EntryToFill:
    """A stored parameter, and the tensors whose values come from it."""

    stored: StoredEntry
    tensors: tuple[FileTensor, ...]

    @property
    def nbytes(self) -> int:
        """The bytes to write."""
        return sum(tensor.nbytes for tensor in self.tensors)


def lay_out(
    folder: Path, tensors: Sequence[tuple[str, Shape, torch.dtype]], *, shard_bytes: int
) -> dict[str, FileTensor]:
    """Makes the files, with their headers and without values, and the index if there are several.

    Args:
        tensors: name, shape and dtype of each, in the order of the files.
        shard_bytes: the most bytes that the tensors of a file have together; a larger tensor gets a file of its own.

    Returns:
        The tensors to fill in, by name.
    """
    files: list[list[tuple[str, Shape, torch.dtype]]] = [[]]
    used = 0
    for tensor in tensors:
        nbytes = math.prod(tensor[1]) * tensor[2].itemsize
        if files[-1] and used + nbytes > shard_bytes:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += nbytes
    laid: dict[str, FileTensor] = {}
    for number, held in enumerate(files, start=1):
        laid.update(_make_file(folder / shard_name(number, len(files)), held))
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in laid.values())
        write_index(folder, {name: tensor.path.name for name, tensor in laid.items()}, total_bytes=total)
    return laid


def _make_file(path: Path, tensors: Sequence[tuple[str, Shape, torch.dtype]]) -> dict[str, FileTensor]:
    """Writes the header: its length in 8 bytes, then JSON with each tensor's dtype, shape, first byte and end."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = [], 0
    for name, shape, dtype in tensors:
        begins.append(end)
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[-1], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {
        name: FileTensor(path, name, dtype, shape, start=8 + len(text) + begin)
        for (name, shape, dtype), begin in zip(tensors, begins, strict=True)
    }


def fill(share: tuple[Path, tuple[EntryToFill, ...]], on_bytes: OnBytes) -> None:
    """Fills in some parameters from a distributed checkpoint.

    Args:
        share: the checkpoint, and the parameters that this process fills in.
    """
    dist_ckpt, entries = share
    weights = StoredWeights(dist_ckpt)
    for write in read_ahead(write for entry in entries for write in _writes(weights, entry)):
        write.tensor.write_rows(write.row, write.values)
        on_bytes(write.nbytes)


@dataclass(frozen=True)
class _RowsToWrite:
    """Rows to write into a tensor."""

    tensor: FileTensor
    row: int
    """The row of the tensor that is the first to be written."""
    values: Tensor

    @property
    def nbytes(self) -> int:
        """The bytes to write."""
        return self.values.numel() * self.tensor.dtype.itemsize


def _writes(weights: StoredWeights, entry: EntryToFill) -> Iterator[_RowsToWrite]:
    """Reads a parameter, and yields everything to be written of it; a few rows at a time if the kind allows it."""
    kind, blocks = entry.stored.entry.kind, entry.stored.blocks
    if not kind.stacks_rows:
        parameter = torch.cat([weights.rows(block, block.row, block.end) for block in blocks])
        # [None]: the checkpoint's parameter is that of a single tensor-parallel rank.
        for tensor, values in zip(entry.tensors, merge(kind, parameter[None]), strict=True):
            yield _RowsToWrite(tensor, 0, values)
        return
    heights = [tensor.shape[0] for tensor in entry.tensors]
    for block in blocks:
        for low, high in weights.row_ranges(block, num_bytes=PIECE_BYTES):
            rows, done = weights.rows(block, low, high), 0
            for number, begin, end in rows_by_tensor(low, high, heights):
                yield _RowsToWrite(entry.tensors[number], begin, rows[done : done + end - begin])
                done += end - begin
