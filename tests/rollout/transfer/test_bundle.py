"""The pieces of a buffer, its size, and the description of a tensor that lies in strides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.rollout.transfer.bundle import Bundle, WholeTensor, buffer_capacity, drain, pieces_of
from megatron_vppo.rollout.transfer.shared_buffer import ALIGNMENT, SharedBuffer


class Halves:
    """The columns of a matrix on two ranks, gathered one half after the other."""

    names, shapes, dtype, num_values = ("w",), ((3, 4),), torch.float32, 12

    def gather(self, room: Tensor) -> list[Tensor]:
        whole = torch.arange(12.0).view(3, 4)
        gathered = room.view(2, 3, 2)
        gathered.copy_(torch.stack([whole[:, :2], whole[:, 2:]]))
        return [gathered.movedim(0, 1)]


class Stream(Iterator[tuple[str, Tensor]]):
    """A stream that knows pieces; `asked` says how it was read."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._rest = iter(["first", "second"])

    @property
    def piece_bytes(self) -> tuple[int, ...]:
        return 48, 48

    def pieces(self) -> Iterator[Any]:
        for name in self._rest:
            self.asked.append(f"piece {name}")
            yield Halves()

    def __next__(self) -> tuple[str, Tensor]:
        name = next(self._rest)
        self.asked.append(f"tensor {name}")
        return name, torch.zeros(1)


def read(bundle: Bundle) -> dict[str, list[Any]]:
    """Reads the buffer by its description, with indices computed one by one."""
    info, tensors = bundle.update_info(), {}
    memory = bundle.buffer.room(0, bundle.num_bytes // 4, torch.float32)
    for name, offset, sizes, strides, shape in zip(
        *(info[field] for field in ("names", "offsets", "sizes", "strides", "shapes")), strict=True
    ):
        places = [
            offset // 4 + sum(i * stride for i, stride in zip(index, strides, strict=True))
            for index in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).view(-1, len(sizes)).tolist()
        ]
        tensors[name] = memory[torch.tensor(places)].view(shape).tolist()
    return tensors


def test_what_lies_in_strides_is_described_as_it_lies() -> None:
    buffer = SharedBuffer()
    buffer.grow(256)
    bundle = Bundle(buffer)
    bundle.pack(WholeTensor("b", torch.tensor([5.0, 6.0]).expand(2)))
    (view,) = bundle.pack(Halves())
    assert read(bundle) == {"b": [5.0, 6.0], "w": torch.arange(12.0).view(3, 4).tolist()}
    assert bundle.update_info()["strides"][1] == [2, 6, 1] and bundle.update_info()["offsets"] == [0, ALIGNMENT]
    view.zero_()
    assert not any(map(any, read(bundle)["w"])), "what is returned lies in the buffer"
    buffer.close()


def test_a_piece_fits_or_is_the_first() -> None:
    buffer = SharedBuffer()
    buffer.grow(2 * ALIGNMENT)
    bundle = Bundle(buffer)
    large = WholeTensor("large", torch.zeros(3 * ALIGNMENT // 4))
    assert bundle.has_room(large)
    bundle.pack(WholeTensor("small", torch.zeros(1)))
    assert bundle.has_room(Halves()) and not bundle.has_room(large)
    bundle = Bundle(buffer)
    bundle.pack(large)
    assert buffer.capacity == bundle.num_bytes == 3 * ALIGNMENT
    buffer.close()


def test_streams_with_and_without_pieces() -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    plain = list(pieces_of(iter(tensors.items())))
    assert [(piece.names, piece.shapes, piece.num_values) for piece in plain] == [
        (("a",), ((2, 3),), 6),
        (("b",), ((4,),), 4),
    ]
    stream = Stream()
    assert len(list(pieces_of(stream))) == 2 and stream.asked == ["piece first", "piece second"]


def test_draining_reads_to_the_end() -> None:
    stream, plain = Stream(), iter([("a", torch.zeros(1))])
    drain(stream)
    drain(plain)
    assert stream.asked == ["piece first", "piece second"] and next(plain, None) is None


MIB = 2**20


def buffers(sizes: list[int], capacity: int) -> int:
    """The fewest buffers that hold the pieces in their order: each is filled as far as it goes."""
    filled = [0]
    for size in sizes:
        if filled[-1] and filled[-1] + size > capacity:
            filled.append(0)
        filled[-1] += size
    return len(filled)


@pytest.mark.parametrize("seed", range(20))
def test_there_are_no_more_buffers_than_full_ones_and_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [64 * int(n) for n in torch.randint(1, MIB // 64, (200,), generator=generator)]
    capacity = buffer_capacity(sizes, limit=2 * MIB, affordable=math.inf)  # type: ignore[arg-type]
    most = sum(sizes) / (2 * MIB) + 1
    assert buffers(sizes, capacity) <= most
    assert capacity == 2 * MIB or buffers(sizes, capacity - 2 * MIB // 16) > most, "and it is no larger than that"
    assert capacity <= 3 * MIB


def test_sizes_of_buffers() -> None:
    shared = {"limit": 1024, "affordable": 10_000}
    assert buffer_capacity([], **shared) == 1024, "of a stream that does not say"
    assert buffer_capacity([64, 128], **shared) == 192, "not more than there is"
    assert buffer_capacity([640] * 8, limit=1024, affordable=0) == 640, "at least the largest piece"
    assert buffer_capacity([640] * 8, limit=1024, affordable=700) == 700, "not more than the memory allows"
    assert buffer_capacity([640] * 8, **shared) == 1280, "8 pieces in 6 buffers at most, so two in each"
    assert buffer_capacity([65], **shared) == 2 * ALIGNMENT, "pieces begin at multiples of a cache line"
