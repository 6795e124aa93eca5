"""Host memory that the trainer writes and every worker of an engine on the same machine reads.

A memfd has no name in /dev/shm: readers open it through /proc/<writer>/fd/<n>, and the kernel frees it when the last
process that holds it is gone, however it went.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; every tensor starts at a multiple of this, a cache line, which suits every dtype."""


def aligned(num_bytes: int) -> int:
    """Rounds up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _map(fd: int, capacity: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(fd, capacity), dtype=torch.uint8)


class SharedBuffer:
    """The writer's end. A page takes memory only once it is written."""

    def __init__(self, capacity: int) -> None:
        self._fd = os.memfd_create("vppo-weights")
        self._path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.capacity = 0
        self.grow(capacity)

    def grow(self, capacity: int) -> None:
        """Makes room for at least `capacity` bytes."""
        if capacity > self.capacity:
            os.ftruncate(self._fd, capacity)
            self.bytes = _map(self._fd, capacity)
            self.capacity = capacity

    def write(self, tensor: Tensor, *, offset: int) -> None:
        """Copies a tensor of any device and layout to `offset` (a multiple of ALIGNMENT)."""
        num_bytes = tensor.numel() * tensor.element_size()
        self.bytes[offset : offset + num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def publish(self) -> dict[str, Any]:
        """Returns the arguments of `SharedBufferReader.read`, which then sees everything that was written."""
        return {"path": self._path, "capacity": self.capacity}

    def free(self) -> None:
        """Does nothing: it is host memory, and readers keep it mapped from one transfer to the next."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self.bytes


class SharedBufferReader:
    """A reader's end. It keeps each buffer mapped until the buffer grows."""

    def __init__(self) -> None:
        self._mapped: dict[str, Tensor] = {}

    def read(self, path: str, capacity: int) -> Tensor:
        """Returns a uint8 [capacity] view of the writer's memory."""
        mapped = self._mapped.get(path)
        if mapped is None or mapped.numel() != capacity:
            fd = os.open(path, os.O_RDWR)
            try:
                mapped = _map(fd, capacity)
            finally:
                os.close(fd)
            self._mapped[path] = mapped
        return mapped

    def close(self) -> None:
        self._mapped.clear()
