"""GPU memory that the trainer writes and every worker of an engine on the same machine reads, over CUDA IPC.

For each export of a tensor torch expects one opening and one closing by a reader, and frees the memory when all exports
are closed. So there is one export per reader, made once with the memory, and the reader opens it once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

STORAGE_DEVICE = 6
"""The position of the device number among the arguments of `rebuild_cuda_tensor`."""

Handle = tuple[Any, ...]
"""The arguments of `rebuild_cuda_tensor`; picklable, and valid in other processes only."""


class DeviceBuffer:
    """The writer's end. It holds memory from `grow` until `free`."""

    def __init__(self, *, device: torch.device, num_readers: int) -> None:
        self._device = device
        self._num_readers = num_readers
        self._bytes: Tensor | None = None
        self._handles: list[Handle] = []

    @property
    def capacity(self) -> int:
        return 0 if self._bytes is None else self._bytes.numel()

    @property
    def free_bytes(self) -> int:
        """The memory of the GPU that no process holds, and what torch holds for this one without a use."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def grow(self, capacity: int) -> None:
        """Takes at least `capacity` bytes. Earlier contents may be lost."""
        if capacity > self.capacity:
            self.free()
            self._bytes = torch.empty(capacity, dtype=torch.uint8, device=self._device)

    def room(self, offset: int, num_values: int, dtype: torch.dtype) -> Tensor:
        """Returns the memory of [num_values] at `offset` (a multiple of ALIGNMENT)."""
        assert self._bytes is not None, "grow makes the room"
        return self._bytes[offset : offset + num_values * dtype.itemsize].view(dtype)

    def publish(self) -> dict[str, Any]:
        """Returns one handle per reader, after all copies are done: readers cannot wait for events of this process."""
        torch.cuda.current_stream(self._device).synchronize()
        if not self._handles:  # not earlier: a handle that no reader opens keeps the memory
            self._handles = [reduce_tensor(self._bytes)[1] for _ in range(self._num_readers)]
        return {"handles": self._handles}

    def free(self) -> None:
        """Gives the memory back. If a reader still has it open, torch frees it when the reader closes it."""
        if self._bytes is not None:
            self._bytes, self._handles = None, []
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def close(self) -> None:
        self.free()


class DeviceBufferReader:
    """A reader's end. It opens each buffer once between two calls of `close`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._opened: dict[Handle, Tensor] = {}

    def read(self, handle: Handle) -> Tensor:
        """Returns a uint8 [capacity] view of the writer's memory.

        The memory may be another GPU's. CUDA then maps it by peer access: torch calls cudaIpcOpenMemHandle with
        cudaIpcMemLazyEnablePeerAccess.

        Raises:
            RuntimeError: the memory cannot be opened here.
        """
        key = tuple(handle)
        if key not in self._opened:
            arguments = list(key)
            arguments[STORAGE_DEVICE] = self._device.index
            try:
                self._opened[key] = rebuild_cuda_tensor(*arguments)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{self._device} cannot open the trainer's buffer over CUDA IPC ({error}); where GPUs have no peer "
                    "access to each other, set rollout.weight_transfer=shm or rollout.tensor_parallel_size=1"
                ) from error
        return self._opened[key]

    def close(self) -> None:
        self._opened.clear()
