"""The reading of rows of parameters from a distributed checkpoint, whatever wrote it: a conversion, or a training under
any layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_vppo.conversion.places import StoredBlock, StoredEntry
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint, check_stored, one_line, place_of, read_metadata
from megatron_vppo.weights.dist_records import check_records
from megatron_vppo.weights.finite import non_finite
from megatron_vppo.weights.kinds import Shape

OPTIMIZER = "optimizer."
"""The beginning of the keys of a training checkpoint that are not weights."""


class StoredWeights:
    """The tensors of a distributed checkpoint. None of its pickles is loaded: tensors only, with `weights_only`."""

    def __init__(self, dist_ckpt: Path) -> None:
        """
        Raises:
            ValueError: the checkpoint is incomplete, or would execute something.
        """
        self._path = dist_ckpt
        self._metadata = read_metadata(dist_ckpt)
        self._reader = FileSystemReader(dist_ckpt)
        self._reader.set_up_storage_reader(self._metadata, True)
        self._by_layer: dict[str, dict[Shape, list[ChunkStorageMetadata]]] = {}

    def check(self, stored: StoredEntry) -> torch.dtype:
        """Returns the dtype of a parameter.

        Raises:
            ValueError: it is missing, has another shape, or some of its values are not there.
        """
        dtypes = set()
        for block in stored.blocks:
            found = check_stored(
                self._path,
                self._metadata,
                key=block.key,
                size=block.size,
                unpadded_rows=stored.entry.kind.unpadded_rows,
            )
            offset, sizes = block.region(block.row, block.end)
            held = sum(torch.Size(lengths).numel() for _, lengths, _ in self._overlaps(block, offset, sizes))
            if held != torch.Size(sizes).numel():
                raise ValueError(f"{block.key} in {self._path} has {held} of the {torch.Size(sizes).numel()} values")
            dtypes.add(found.properties.dtype)
        assert len(dtypes) == 1
        return dtypes.pop()

    def check_keys(self, known: Collection[str]) -> None:
        """Checks that all tensors are known or belong to the optimizer.

        Raises:
            ValueError: there are others.
        """
        held = {
            key
            for key, found in self._metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata) and not key.startswith(OPTIMIZER)
        }
        if unknown := sorted(held - set(known)):
            raise ValueError(
                f"{self._path} has {len(unknown)} tensors that the model does not know, first {unknown[:5]}; does "
                "config.json belong to these weights?"
            )

    def check_records(self, known: Collection[str]) -> None:
        """Checks the records of these tensors, see `check_records`.

        Raises:
            DamagedCheckpoint: one is damaged.
        """
        check_records(self._path, self._metadata, known)

    def row_ranges(self, block: StoredBlock, *, num_bytes: int) -> list[tuple[int, int]]:
        """Divides the parameter's rows in this block into ranges of about `num_bytes`.

        A range ends only where a stored piece does, so that no piece is read twice; it may therefore be longer.
        """
        found = self._described(block.key)
        offset, sizes = block.region(block.row, block.end)
        at = block.stacked  # the dimension of the tensor that is the parameter's rows
        row_bytes = torch.Size(sizes[at + 1 :]).numel() * found.properties.dtype.itemsize
        enough = max(1, num_bytes // row_bytes)
        first = offset[at]
        starts = {start[at] for start, _, _ in self._overlaps(block, offset, sizes)}
        borders = [first]
        for start in sorted(starts - {first}):
            if start - borders[-1] >= enough:
                borders.append(start)
        borders.append(first + sizes[at])
        shift = block.row - first  # from rows of the tensor to rows of the parameter
        return [(low + shift, high + shift) for low, high in itertools.pairwise(borders)]

    def rows(self, block: StoredBlock, low: int, high: int) -> Tensor:
        """Reads the parameter's rows `low` to `high`, which lie in this block.

        Raises:
            DamagedCheckpoint: a file is damaged, or a value is NaN or infinite.
        """
        described = self._described(block.key)
        offset, sizes = block.region(low, high)
        target = torch.empty(sizes, dtype=described.properties.dtype)
        items = [
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(block.key, torch.Size(offset)),
                dest_offsets=torch.Size(a - b for a, b in zip(start, offset, strict=True)),
                storage_index=MetadataIndex(block.key, chunk.offsets),
                storage_offsets=torch.Size(a - b for a, b in zip(start, chunk.offsets, strict=True)),
                lengths=torch.Size(lengths),
            )
            for start, lengths, chunk in self._overlaps(block, offset, sizes)
        ]
        where = partial(place_of, self._path, self._metadata, block.key, offset, sizes, stacked=block.stacked)
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except Exception as error:  # whatever bytes are there: torch.load may raise anything
            raise DamagedCheckpoint(f"{where()} cannot be read: {one_line(error)}") from error
        if found := non_finite(target):
            raise DamagedCheckpoint(f"{where()} holds {found}")
        return target.reshape(sizes[block.stacked :])

    def _described(self, key: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def _chunks(self, block: StoredBlock) -> list[ChunkStorageMetadata]:
        """Returns the stored pieces of the block's layer.

        They are sorted by layer once, since a large model has thousands of pieces of all layers together.
        """
        if block.key not in self._by_layer:
            layers = self._by_layer[block.key] = {}
            for chunk in self._described(block.key).chunks:
                assert all(size == 1 for size in chunk.sizes[: block.stacked]), "a piece of several layers"
                layers.setdefault(tuple(chunk.offsets[: block.stacked]), []).append(chunk)
        return self._by_layer[block.key].get(block.offset[: block.stacked], [])

    def _overlaps(
        self, block: StoredBlock, offset: Shape, sizes: Shape
    ) -> list[tuple[Shape, Shape, ChunkStorageMetadata]]:
        """Returns (start, lengths, stored piece) of everything stored that lies in a region of the tensor."""
        found = []
        for chunk in self._chunks(block):
            start = tuple(max(a, b) for a, b in zip(offset, chunk.offsets, strict=True))
            ends = [min(a + n, b + m) for a, n, b, m in zip(offset, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if all(end > low for low, end in zip(start, ends, strict=True)):
                found.append((start, tuple(end - low for low, end in zip(start, ends, strict=True)), chunk))
        return found


class _Into(DefaultLoadPlanner):
    """Fills one tensor with whatever is read."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            region = region.narrow(dimension, start, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
