"""What one process of a conversion to Megatron writes. Without Megatron, so that a process is small and starts soon."""

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
from megatron_vppo.conversion.workers import Report
from megatron_vppo.weights.hf_folder import LazyTensor
from megatron_vppo.weights.kinds import Kind, Shape


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor as they are."""

    tensor: LazyTensor
    low: int
    high: int

    def read(self) -> Tensor:
        return self.tensor[self.low : self.high]


@dataclass(frozen=True)
class Shard:
    """What one of `size` tensor-parallel ranks would hold: the rows of a parameter whose order differs."""

    kind: Kind
    tensors: tuple[LazyTensor, ...]
    rank: int
    size: int

    def read(self) -> Tensor:
        return self.kind.shard(self.tensors, rank=self.rank, size=self.size)


@dataclass(frozen=True)
class Piece:
    key: str
    size: Shape
    """Of the whole tensor `key`."""
    offset: Shape
    sizes: Shape
    """Of this piece in it."""
    source: Rows | Shard
    dtype: torch.dtype
    """As stored; the source may have another."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.source.read().to(self.dtype).reshape(self.sizes)

    def write_item(self) -> WriteItem:
        chunk = ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=torch.Size(self.sizes))
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=torch.Size(self.size))
        return WriteItem(MetadataIndex(self.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


@dataclass(frozen=True)
class FilePart:
    """What one process writes: plans of whole files, each with the pieces it needs."""

    dist_ckpt: Path
    plans: tuple[SavePlan, ...]
    pieces: dict[MetadataIndex, Piece]


class LazyPlanner(DefaultSavePlanner):
    """Has each tensor made shortly before the writer asks for it. To be closed."""

    def __init__(self, pieces: Mapping[MetadataIndex, Piece], report: Report) -> None:
        """
        Args:
            pieces: in the order in which the writer will ask for them.
        """
        super().__init__(flatten_state_dict=False)
        self._made = read_ahead((index, piece.read()) for index, piece in pieces.items())
        self._report = report

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # as Megatron writes the empty state of a layer
            return nothing
        index, tensor = next(self._made)
        if index != write_item.index:
            raise RuntimeError(f"the writer asks for {write_item.index} when it is {index}'s turn")
        self._report(tensor.nbytes)
        return tensor

    def close(self) -> None:
        self._made.close()


def write_files(part: FilePart, report: Report) -> list[list[WriteResult]]:
    """What was written where, by file.

    Raises:
        OSError: a write failed.
    """
    writer = file_writer(part.dist_ckpt)
    with closing(LazyPlanner(part.pieces, report)) as planner:
        try:
            return [writer.write_data(plan, planner).value() for plan in part.plans]
        except RuntimeError as error:
            raise _behind(error) from None


def _behind(error: RuntimeError) -> BaseException:
    """What ended a write. torch.save then also finds that its file is too short, and says only that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) or not isinstance(cause, Exception):  # the latter is Ctrl-C or SIGTERM
            return cause
        cause = cause.__context__
    return error


def file_writer(dist_ckpt: Path) -> FileSystemWriter:
    # Flushed once, when everything is written; nothing is copied ahead, also where there are GPUs.
    writer = FileSystemWriter(dist_ckpt, sync_files=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    return writer
