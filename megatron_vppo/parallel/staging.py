"""The way of many small tensors to the device: one buffer and one copy, for which the host does not wait.

A copy from ordinary memory makes the host wait until the device has done all of its work so far. So the tensors of a
record are packed into one buffer of pinned memory, and sent on a stream of their own while the device computes.
Integers travel in the narrowest type that holds them, and are widened on the device:

    record      token_ids int64    positions int64    hidden bool     on the host
                |                  |                  |
    buffer      int32              int16              bool            pinned; one copy, on the stream of copies
                |                  |                  |
    arrived     int64              int64              bool            one widening per narrow type
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")

_ALIGNMENT = 16
"""Bytes; kernels read up to 16 bytes at once."""
_NARROW = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class _Group:
    """Tensors that travel in the same type and arrive in the same type. They lie together in the buffer."""

    travels_as: torch.dtype
    arrives_as: torch.dtype
    start: int
    """Bytes."""
    count: int
    """Elements, gaps between tensors included."""
    members: tuple[tuple[int, int, torch.Size], ...]
    """(number, first element, shape) of each tensor."""


@dataclass(frozen=True)
class Staged(Generic[Record]):
    """A record whose tensors lie in a buffer, ready to be sent."""

    record: Record
    """The record itself, for all that is no tensor."""
    buffer: Tensor
    """uint8."""
    groups: tuple[_Group, ...]


class Stager:
    """Packs records of tensors for one device, and sends them. A record is a frozen dataclass or a tuple, and may hold
    others.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pack(self, record: Record) -> Staged[Record]:
        """Copies the tensors of a record into one buffer. Another thread may do so while the device works."""
        number_of: dict[int, int] = {}
        tensors: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            if id(tensor) not in number_of:  # a tensor that the record holds twice is sent once
                number_of[id(tensor)] = len(tensors)
                tensors.append(tensor)
            return tensor

        _map_tensors(record, note)
        types = [(_travel_type(tensor), tensor.dtype) for tensor in tensors]
        groups: list[_Group] = []
        end = 0
        for travels_as, arrives_as in dict.fromkeys(types):
            members = [n for n, of_tensor in enumerate(types) if of_tensor == (travels_as, arrives_as)]
            group = _lay_out(tensors, members, travels_as, arrives_as, start=end)
            groups.append(group)
            end = _aligned(group.start + group.count * travels_as.itemsize, _ALIGNMENT)
        buffer = host_buffer(end, self._device)
        for group in groups:
            section = _section(buffer, group).numpy()
            for number, first, _ in group.members:
                flat = tensors[number].numpy().reshape(-1)
                section[first : first + len(flat)] = flat
        return Staged(record, buffer, tuple(groups))

    def send(self, staged: Staged[Record]) -> Record:
        """Returns the record with its tensors on the device. The host does not wait for the copy, kernels do.

        Bytes are views of the buffer, and everything else a copy: attention and autograd hold some of it until the
        backward pass, and would hold the images of the micro-batch with it.
        """
        buffer = self._copy(staged.buffer)
        arrived: dict[int, Tensor] = {}
        for group in staged.groups:
            section = _section(buffer, group)
            if group.arrives_as != torch.uint8:  # bytes are images: they are large, and done with soon
                section = section.to(group.arrives_as, copy=True)
            for number, first, shape in group.members:
                arrived[number] = section[first : first + shape.numel()].view(shape)
        numbers: dict[int, Tensor] = {}

        def take(tensor: Tensor) -> Tensor:
            if id(tensor) not in numbers:
                numbers[id(tensor)] = arrived[len(numbers)]
            return numbers[id(tensor)]

        return _map_tensors(staged.record, take)

    def _copy(self, buffer: Tensor) -> Tensor:
        if self._stream is None:
            return buffer.to(self._device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            copy = buffer.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        copy.record_stream(computing)  # its memory is not given away before the kernels that read it are done
        return copy


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Returns uint8 [bytes] on the host, pinned if the device is a GPU: only from there a copy runs by itself."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a record with changed tensors; parts without tensors are kept. Always takes them in the same order."""
    if type(value) is Tensor:  # subclasses, such as torch's masks of attention, hold no data
        return change(value)
    if isinstance(value, tuple):
        changed = tuple(_map_tensors(item, change) for item in value)
        return value if all(new is old for new, old in zip(changed, value, strict=True)) else changed
    if isinstance(value, list | dict | set):
        raise TypeError(f"a record holds a {type(value).__name__}; put its tensors in a tuple or a dataclass")
    if not is_dataclass(value) or isinstance(value, type):
        return value
    parts = {}
    for field in fields(value):
        old = getattr(value, field.name)
        if (new := _map_tensors(old, change)) is not old:
            parts[field.name] = new
    return replace(value, **parts) if parts else value


def _travel_type(tensor: Tensor) -> torch.dtype:
    """Returns the narrowest integer type that holds all values of an int64 tensor; any other type stays."""
    if tensor.dtype != torch.int64:
        return tensor.dtype
    values = tensor.numpy()
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for narrow in _NARROW:
        limits = torch.iinfo(narrow)
        if limits.min <= least and most <= limits.max:
            return narrow
    return torch.int64


def _lay_out(
    tensors: list[Tensor], numbers: list[int], travels_as: torch.dtype, arrives_as: torch.dtype, *, start: int
) -> _Group:
    members, count = [], 0
    for number in numbers:
        # What is widened is aligned by its new type. What is not is read in place, from the buffer.
        count = _aligned(count, _ALIGNMENT // travels_as.itemsize) if travels_as == arrives_as else count
        members.append((number, count, tensors[number].shape))
        count += tensors[number].numel()
    return _Group(travels_as, arrives_as, start, count, tuple(members))


def _section(buffer: Tensor, group: _Group) -> Tensor:
    return buffer[group.start : group.start + group.count * group.travels_as.itemsize].view(group.travels_as)


def _aligned(number: int, to: int) -> int:
    return -(-number // to) * to
