"""The tensors that go to an engine together: one transfer buffer, filled piece by piece, and its description.

Pieces are gathered into the buffer as the ranks hold them, and copied nowhere before. So a tensor may lie in it in
strides, the rows of one shard after those of another. The engine is told how, and puts it in order as it reads
(`scattered.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_vppo.rollout.transfer.shared_buffer import aligned

Shape = tuple[int, ...]
_STEPS = 16
"""The steps per buffer size in which `buffer_capacity` looks for one that needs fewer round trips."""


class Packable(Protocol):
    """Tensors that are gathered together, and have not been yet."""

    names: tuple[str, ...]
    """Hugging Face names."""
    shapes: tuple[Shape, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        """The values that `gather` needs room for: at least those of the tensors."""

    def gather(self, room: Tensor) -> list[Tensor]:
        """Fills [num_values] and returns a view of it for each tensor, which has its values in their order."""


@runtime_checkable
class GatheringStream(Protocol):
    """A stream of named tensors that can also be gathered where the caller wants them."""

    @property
    def piece_bytes(self) -> Sequence[int]:
        """The bytes that each piece takes, in the order of the stream."""

    def pieces(self) -> Iterator[Packable]: ...


class WholeTensor:
    """A piece that is one tensor, which is there already."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.names: tuple[str, ...] = (name,)
        self.shapes: tuple[Shape, ...] = (tuple(tensor.shape),)
        self.dtype = tensor.dtype
        self.num_values = tensor.numel()
        self._tensor = tensor.detach()

    def gather(self, room: Tensor) -> list[Tensor]:
        return [room.view(self._tensor.shape).copy_(self._tensor)]


def pieces_of(stream: Iterable[tuple[str, Tensor]]) -> Iterator[Packable]:
    """Returns the pieces of a stream: each tensor by itself, if the stream knows no others."""
    if isinstance(stream, GatheringStream):
        return stream.pieces()
    return (WholeTensor(name, tensor) for name, tensor in stream)


def drain(stream: Iterable[tuple[str, Tensor]]) -> None:
    """Takes part in making all of a stream, and keeps nothing of it."""
    if isinstance(stream, GatheringStream):
        for _ in stream.pieces():
            pass
    for _ in stream:
        pass


def buffer_capacity(piece_bytes: Sequence[int], *, limit: int, affordable: int) -> int:
    """Chooses the size of a buffer.

    It is the least from `limit` on with which the pieces need at most one buffer more than bytes / limit. Less if that
    is not affordable, but at least the largest piece; and never more than all pieces together.

    Args:
        piece_bytes: the bytes of each piece; empty: unknown.
        limit: the size of a buffer that pieces would fill without a gap.
        affordable: the most that a buffer should take.
    """
    if not piece_bytes:
        return limit
    sizes = [aligned(size) for size in piece_bytes]
    most = sum(sizes) // limit + 1
    wanted = limit
    while _buffers(sizes, wanted) > most:
        wanted += aligned(limit // _STEPS)
    return min(sum(sizes), max(*sizes, min(wanted, affordable)))


def _buffers(sizes: Sequence[int], capacity: int) -> int:
    buffers, used = 1, 0
    for size in sizes:
        if used and used + size > capacity:
            buffers, used = buffers + 1, 0
        used += size
    return buffers


class TransferBuffer(Protocol):
    """Memory that this process writes and the engine's workers read."""

    @property
    def capacity(self) -> int:
        """Its size in bytes."""

    @property
    def free_bytes(self) -> int:
        """The memory of its kind that is free."""

    def grow(self, capacity: int) -> None:
        """Makes room for at least `capacity` bytes; only while nothing is packed."""

    def room(self, offset: int, num_values: int, dtype: torch.dtype) -> Tensor:
        """Returns the memory of [num_values] at a multiple of ALIGNMENT."""

    def publish(self) -> dict[str, Any]:
        """Returns the fields of the update info by which a worker finds the buffer and everything written to it."""

    def free(self) -> None:
        """Gives memory back after a transfer, when nobody reads any more. The next one begins with `grow`."""

    def close(self) -> None: ...


class Bundle:
    """The tensors in one buffer, with their description for `weight_receiver.PackedUpdateInfo`."""

    def __init__(self, buffer: TransferBuffer) -> None:
        self.buffer = buffer
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[list[int]] = []
        self._offsets: list[int] = []
        self._sizes: list[list[int]] = []
        self._strides: list[list[int]] = []
        self.num_bytes = 0

    def has_room(self, piece: Packable) -> bool:
        return not self._names or self.num_bytes + _bytes(piece) <= self.buffer.capacity

    def pack(self, piece: Packable) -> list[Tensor]:
        """Gathers a piece into the buffer; returns its tensors as they lie there."""
        if not self._names:
            self.buffer.grow(_bytes(piece))
        room = self.buffer.room(self.num_bytes, piece.num_values, piece.dtype)
        views = piece.gather(room)
        for name, shape, view in zip(piece.names, piece.shapes, views, strict=True):
            assert view.untyped_storage().data_ptr() == room.untyped_storage().data_ptr(), f"{name} lies elsewhere"
            self._names.append(name)
            self._dtypes.append(str(piece.dtype).removeprefix("torch."))
            self._shapes.append(list(shape))
            self._offsets.append(int(view.storage_offset()) * piece.dtype.itemsize)
            self._sizes.append(list(view.shape))
            self._strides.append(list(view.stride()))
        self.num_bytes += _bytes(piece)
        return views

    def update_info(self) -> dict[str, Any]:
        return {
            **self.buffer.publish(),
            "names": self._names,
            "dtypes": self._dtypes,
            "shapes": self._shapes,
            "offsets": self._offsets,
            "sizes": self._sizes,
            "strides": self._strides,
        }


def _bytes(piece: Packable) -> int:
    return aligned(piece.num_values * piece.dtype.itemsize)
