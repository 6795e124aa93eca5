"""Host memory that the trainer writes and every worker of an engine on the same machine reads.

A memfd has no name in /dev/shm: readers open it through /proc/<writer>/fd/<n>, and the kernel frees it when the last
process that holds it is gone, however it went.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
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

    def __init__(self) -> None:
        self._fd = os.memfd_create("vppo-weights")
        self._path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def capacity(self) -> int:
        return self._bytes.numel()

    @property
    def free_bytes(self) -> int:
        """The memory of the host that is free, or holds only what was read from files."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024

    def grow(self, capacity: int) -> None:
        """Makes room for at least `capacity` bytes."""
        if capacity > self.capacity:
            os.ftruncate(self._fd, capacity)
            self._bytes = _map(self._fd, capacity)

    def room(self, offset: int, num_values: int, dtype: torch.dtype) -> Tensor:
        """Returns the memory of [num_values] at `offset` (a multiple of ALIGNMENT)."""
        return self._bytes[offset : offset + num_values * dtype.itemsize].view(dtype)

    def publish(self) -> dict[str, Any]:
        """Returns the arguments of `SharedBufferReader.read`, which then sees everything that was written."""
        return {"path": self._path, "capacity": self.capacity}

    def free(self) -> None:
        """Does nothing: it is host memory, and readers keep it mapped from one transfer to the next."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._bytes


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
