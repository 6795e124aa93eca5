"""Reads rows of parameters from a distributed checkpoint, written by a conversion or by a training under any layout."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_vppo.conversion.places import StoredEntry, StoredPart
from megatron_vppo.weights.dist_metadata import check_stored, read_metadata
from megatron_vppo.weights.kinds import Shape, Vocabulary

OPTIMIZER = "optimizer."
"""What the keys of a training checkpoint begin with that are no weights."""


class StoredWeights:
    """The tensors of a distributed checkpoint. Its pickles are not loaded: tensors only, with `weights_only`."""

    def __init__(self, dist_ckpt: Path) -> None:
        """Raises ValueError where the checkpoint is incomplete, or would execute something."""
        self._path = dist_ckpt
        self._metadata = read_metadata(dist_ckpt)
        self._reader = FileSystemReader(dist_ckpt)
        self._reader.set_up_storage_reader(self._metadata, True)
        self._by_layer: dict[str, dict[Shape, list[ChunkStorageMetadata]]] = {}

    def check(self, stored: StoredEntry) -> torch.dtype:
        """The dtype of a parameter. Raises ValueError where it is missing, or has another shape, or is not whole."""
        kind = stored.entry.kind
        tokens = kind.tokens if isinstance(kind, Vocabulary) else None
        dtypes = set()
        for part in stored.parts:
            found = check_stored(self._path, self._metadata, key=part.key, size=part.size, tokens=tokens)
            offset, sizes = part.block(part.row, part.row + part.rows)
            held = sum(torch.Size(lap[1]).numel() for lap in self._overlaps(part, offset, sizes))
            if held != torch.Size(sizes).numel():
                raise ValueError(f"{part.key} in {self._path} has {held} of the {torch.Size(sizes).numel()} values")
            dtypes.add(found.properties.dtype)
        assert len(dtypes) == 1
        return dtypes.pop()

    def check_keys(self, known: Collection[str]) -> None:
        """Raises ValueError where the checkpoint holds another tensor than the known ones and the optimizer's."""
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

    def row_steps(self, part: StoredPart, *, num_bytes: int) -> list[tuple[int, int]]:
        """The parameter's rows in this part, in ranges of about `num_bytes`, or of what was stored as one piece."""
        found = self._described(part.key)
        offset, sizes = part.block(part.row, part.row + part.rows)
        at = part.stacked
        row_bytes = torch.Size(sizes[at + 1 :]).numel() * found.properties.dtype.itemsize
        step = max(1, num_bytes // row_bytes)
        starts = {low[at] for low, _, _ in self._overlaps(part, offset, sizes)}
        ends, low = [], offset[at]
        for start in [*sorted(starts - {low}), offset[at] + sizes[at]]:
            if start - low >= step:
                ends.append(start)
                low = start
        if not ends or ends[-1] != offset[at] + sizes[at]:
            ends.append(offset[at] + sizes[at])
        shift = part.row - offset[at]
        return [(low + shift, end + shift) for low, end in zip([offset[at], *ends[:-1]], ends, strict=True)]

    def rows(self, part: StoredPart, low: int, high: int) -> Tensor:
        """The parameter's rows `low` to `high`, which lie in this part.

        Raises:
            ValueError: a file is damaged.
        """
        found = self._described(part.key)
        offset, sizes = part.block(low, high)
        target = torch.empty(sizes, dtype=found.properties.dtype)
        items = [
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(part.key, torch.Size(offset)),
                dest_offsets=torch.Size(a - b for a, b in zip(start, offset, strict=True)),
                storage_index=MetadataIndex(part.key, chunk.offsets),
                storage_offsets=torch.Size(a - b for a, b in zip(start, chunk.offsets, strict=True)),
                lengths=torch.Size(lengths),
            )
            for start, lengths, chunk in self._overlaps(part, offset, sizes)
        ]
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except Exception as error:  # whatever bytes are there: torch.load may raise anything
            raise ValueError(f"{part.key} in {self._path} cannot be read: {error}") from error
        return target.reshape(sizes[part.stacked :])

    def _described(self, key: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def _chunks(self, part: StoredPart) -> list[ChunkStorageMetadata]:
        """What is stored of the part's layer; large models have thousands of pieces of all layers together."""
        if part.key not in self._by_layer:
            layers = self._by_layer[part.key] = {}
            for chunk in self._described(part.key).chunks:
                assert all(size == 1 for size in chunk.sizes[: part.stacked]), "a piece of several layers"
                layers.setdefault(tuple(chunk.offsets[: part.stacked]), []).append(chunk)
        return self._by_layer[part.key].get(part.offset[: part.stacked], [])

    def _overlaps(
        self, part: StoredPart, offset: Shape, sizes: Shape
    ) -> list[tuple[Shape, Shape, ChunkStorageMetadata]]:
        """(start, lengths, stored piece) of everything stored that lies in a block."""
        laps = []
        for chunk in self._chunks(part):
            start = tuple(max(a, b) for a, b in zip(offset, chunk.offsets, strict=True))
            ends = [min(a + n, b + m) for a, n, b, m in zip(offset, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if all(end > low for low, end in zip(start, ends, strict=True)):
                laps.append((start, tuple(end - low for low, end in zip(start, ends, strict=True)), chunk))
        return laps


class _Into(DefaultLoadPlanner):
    """Has one tensor filled."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
