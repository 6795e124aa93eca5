"""GPU memory that the trainer writes and every worker of an engine on the same machine reads, over CUDA IPC.

Torch counts, for each export of a tensor, one opening and one closing by a reader, and frees the memory when all are
closed. So there is one export per reader, made once with the memory, and a reader opens it once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

STORAGE_DEVICE = 6
"""Place of the device's number among the arguments of `rebuild_cuda_tensor`."""

Handle = tuple[Any, ...]
"""Arguments of `rebuild_cuda_tensor`; picklable, and of use in another process only."""


class DeviceBuffer:
    """The writer's end. Holds memory from the first `grow` to `free`, and again from the next `grow`."""

    def __init__(self, capacity: int, *, device: torch.device, num_readers: int) -> None:
        """`capacity`: bytes that the first `grow` takes at least."""
        self.capacity = capacity
        self._device = device
        self._num_readers = num_readers
        self._bytes: Tensor | None = None
        self._handles: list[Handle] = []

    def grow(self, capacity: int) -> None:
        """Hold at least `capacity` bytes. What was written before may be lost."""
        if self._bytes is not None and capacity <= self.capacity:
            return
        self.free()
        self.capacity = max(self.capacity, capacity)
        self._bytes = torch.empty(self.capacity, dtype=torch.uint8, device=self._device)

    def write(self, tensor: Tensor, *, offset: int) -> None:
        """Copy a tensor of any device and layout to `offset` (a multiple of ALIGNMENT)."""
        assert self._bytes is not None, "grow makes the room"
        num_bytes = tensor.numel() * tensor.element_size()
        self._bytes[offset : offset + num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def publish(self) -> dict[str, Any]:
        """One handle per reader. Waits for the copies: no event of this process orders the readers after them."""
        torch.cuda.current_stream(self._device).synchronize()
        if not self._handles:  # not before they are wanted: one that no reader opens keeps the memory
            self._handles = [reduce_tensor(self._bytes)[1] for _ in range(self._num_readers)]
        return {"handles": self._handles}

    def free(self) -> None:
        """Give the memory back; where a reader still has it open, torch does so once that is closed."""
        if self._bytes is not None:
            self._bytes, self._handles = None, []
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def close(self) -> None:
        self.free()


class DeviceBufferReader:
    """A reader's end; opens each buffer once between two calls of `close`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._opened: dict[Handle, Tensor] = {}

    def read(self, handle: Handle) -> Tensor:
        """uint8 [capacity] view of the writer's memory.

        The memory may be another GPU's: CUDA then maps it by peer access (cudaIpcOpenMemHandle with
        cudaIpcMemLazyEnablePeerAccess, which is what torch calls).

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
