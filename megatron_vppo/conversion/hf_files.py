"""The files of a Hugging Face folder, laid out first, each with its header and its full length, and then filled in.

Imports no Megatron, so that the processes that fill them in are small and start soon.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vppo.conversion.places import StoredEntry
from megatron_vppo.conversion.read_ahead import read_ahead
from megatron_vppo.conversion.stored import StoredWeights
from megatron_vppo.conversion.workers import Report
from megatron_vppo.weights.hf_folder import DTYPES, INDEX, SINGLE, raw_bytes
from megatron_vppo.weights.kinds import Gated, Shape, Split, Vocabulary

PIECE_BYTES = 16 << 20
"""Rows that are gathered in memory at a time, while as many are being read; see to_megatron.py."""
ALIGNMENT = 8
"""Of the first tensor's bytes in a safetensors file."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor goes."""

    name: str
    shape: Shape
    dtype: torch.dtype
    path: Path
    start: int
    """Byte of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FilledEntry:
    stored: StoredEntry
    places: tuple[Place, ...]
    """One per tensor that the parameter becomes."""

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places)


def lay_out(folder: Path, tensors: Sequence[tuple[str, Shape, torch.dtype]], *, shard_bytes: int) -> dict[str, Place]:
    """Makes the files, with headers and holes, and their index where there are several."""
    files: list[list[tuple[str, Shape, torch.dtype]]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = math.prod(tensor[1]) * tensor[2].itemsize
        if files[-1] and filled + nbytes > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += nbytes
    places: dict[str, Place] = {}
    for number, held in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        places.update(_make_file(folder / name, held))
    if len(files) > 1:
        total = sum(place.nbytes for place in places.values())
        where = {name: place.path.name for name, place in places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return places


def _make_file(path: Path, tensors: Sequence[tuple[str, Shape, torch.dtype]]) -> dict[str, Place]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    begins = [header[name]["data_offsets"][0] for name, _, _ in tensors]  # type: ignore[index]
    return {
        name: Place(name, shape, dtype, path, 8 + len(text) + begin)
        for (name, shape, dtype), begin in zip(tensors, begins, strict=True)
    }


def fill(part: tuple[Path, tuple[FilledEntry, ...]], report: Report) -> None:
    dist_ckpt, entries = part
    weights = StoredWeights(dist_ckpt)
    for block in read_ahead(block for entry in entries for block in _blocks(weights, entry)):
        _put(block)
        report(block.nbytes)


@dataclass(frozen=True)
class _Block:
    """Rows of a tensor, from row `row` on."""

    place: Place
    row: int
    values: Tensor

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.values.numel() * self.place.dtype.itemsize


def _blocks(weights: StoredWeights, entry: FilledEntry) -> Iterator[_Block]:
    if isinstance(entry.stored.entry.kind, Vocabulary | Split | Gated):
        yield from _blocks_of_rows(weights, entry)
        return
    # The rows are in another order than those of the tensors.
    parameter = torch.cat([weights.rows(part, part.row, part.row + part.rows) for part in entry.stored.parts])
    for place, tensor in zip(entry.places, entry.stored.entry.kind.merge(parameter[None]), strict=True):
        yield _Block(place, 0, tensor)


def _blocks_of_rows(weights: StoredWeights, entry: FilledEntry) -> Iterator[_Block]:
    """A parameter that is the rows of one tensor after those of another."""
    for part in entry.stored.parts:
        for low, high in weights.row_steps(part, num_bytes=PIECE_BYTES):
            rows, first = weights.rows(part, low, high), 0
            for place in entry.places:
                begin, end = max(low, first), min(high, first + place.shape[0])
                if begin < end:
                    yield _Block(place, begin - first, rows[begin - low : end - low])
                first += place.shape[0]


def _put(block: _Block) -> None:
    place = block.place
    data = raw_bytes(block.values.to(place.dtype).contiguous())
    at = place.start + block.row * (place.nbytes // place.shape[0])
    descriptor = os.open(place.path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data, at)
            data, at = data[written:], at + written
    finally:
        os.close(descriptor)
