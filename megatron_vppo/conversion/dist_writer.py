"""The writing of a distributed checkpoint piece by piece: what each process of a conversion to Megatron does.

Imports no Megatron, so that these processes are small and start soon.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vppo.conversion.read_ahead import read_ahead
from megatron_vppo.conversion.workers import OnBytes
from megatron_vppo.weights.finite import cast_weights
from megatron_vppo.weights.hf_folder import FileTensor
from megatron_vppo.weights.kinds import Kind, Shape


@dataclass(frozen=True)
class Rows:
    """The source of a piece that is some rows of one tensor, as they are."""

    tensor: FileTensor
    low: int
    high: int

    def read(self) -> Tensor:
        return self.tensor[self.low : self.high]


@dataclass(frozen=True)
class Shard:
    """The source of a piece whose rows are in another order than the tensors': one of `size` ranks' shards."""

    kind: Kind
    tensors: tuple[FileTensor, ...]
    rank: int
    size: int

    def read(self) -> Tensor:
        return self.kind.shard(self.tensors, rank=self.rank, size=self.size)


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter that are read, cast and written at a time."""

    key: str
    """The name of the tensor in the checkpoint."""
    size: Shape
    """The shape of that tensor."""
    offset: Shape
    """The position of this piece in it."""
    sizes: Shape
    """The shape of this piece in it."""
    source: Rows | Shard
    dtype: torch.dtype
    """The dtype in the checkpoint; the source may have another."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        return cast_weights(self.source.read(), self.dtype, name=self.key).reshape(self.sizes)

    def write_item(self) -> WriteItem:
        chunk = ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=torch.Size(self.sizes))
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=torch.Size(self.size))
        return WriteItem(MetadataIndex(self.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


@dataclass(frozen=True)
class CheckpointShare:
    """The files of a checkpoint that one process writes."""

    dist_ckpt: Path
    plans: tuple[SavePlan, ...]
    """One per file."""
    pieces: dict[MetadataIndex, Piece]
    """The pieces of all these files, in the order in which they are written."""


class LazyPlanner(DefaultSavePlanner):
    """Makes each tensor shortly before the writer asks for it. Close it at the end."""

    def __init__(self, pieces: Mapping[MetadataIndex, Piece], on_bytes: OnBytes) -> None:
        """
        Args:
            pieces: in the order in which the writer will ask for them.
        """
        super().__init__(flatten_state_dict=False)
        self._made = read_ahead((index, piece.read()) for index, piece in pieces.items())
        self._on_bytes = on_bytes

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # as Megatron writes the empty state of a layer
            return nothing
        index, tensor = next(self._made)
        if index != write_item.index:
            raise RuntimeError(f"the writer asks for {write_item.index} when it is {index}'s turn")
        self._on_bytes(tensor.nbytes)
        return tensor

    def close(self) -> None:
        self._made.close()


def write_share(share: CheckpointShare, on_bytes: OnBytes) -> list[list[WriteResult]]:
    """Writes the files of one process.

    Returns:
        For each file, what was written where in it.

    Raises:
        OSError: a write failed.
    """
    writer = file_writer(share.dist_ckpt)
    with closing(LazyPlanner(share.pieces, on_bytes)) as planner:
        try:
            return [writer.write_data(plan, planner).value() for plan in share.plans]
        except RuntimeError as error:
            raise _cause_of(error) from None


def _cause_of(error: RuntimeError) -> BaseException:
    """Finds what ended a write.

    Where a write fails within torch.save, torch then also finds that its file is too short, and reports only that. The
    first error is in the chain of contexts.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) or not isinstance(cause, Exception):  # the latter is Ctrl-C or SIGTERM
            return cause
        cause = cause.__context__
    return error


def file_writer(dist_ckpt: Path) -> FileSystemWriter:
    # Files are flushed once, when everything is written. Nothing is copied ahead, not even where there are GPUs.
    writer = FileSystemWriter(dist_ckpt, sync_files=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    return writer
