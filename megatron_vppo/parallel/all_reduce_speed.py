"""The speed of the network between the ranks, measured before anything depends on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

GPU_BYTES, CPU_BYTES = 64 << 20, 4 << 20
_TIMES = 3
_PATIENCE = timedelta(seconds=120)


@dataclass(frozen=True)
class AllReduceSpeed:
    """The best of a few all-reduces over all ranks."""

    ranks: int
    num_bytes: int
    """The bytes of the tensor on each rank."""
    seconds: float

    @property
    def bus_bytes_per_second(self) -> float:
        """The load of each link, as NCCL's tests count it: 2 (n - 1) / n times the tensor."""
        return 2 * (self.ranks - 1) / self.ranks * self.num_bytes / self.seconds

    def text(self) -> str:
        return (
            f"all-reduce of {self.num_bytes >> 20} MiB over {self.ranks} ranks: {1000 * self.seconds:.1f} ms, "
            f"{self.bus_bytes_per_second / 1e9:.2f} GB/s"
        )


def measure_all_reduce(device: torch.device) -> AllReduceSpeed:
    """Times an all-reduce over all ranks, a collective.

    The first one also opens the connections, and is not counted.

    Raises:
        RuntimeError: one does not end within two minutes.
    """
    values = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    taken = []
    for _ in range(1 + _TIMES):
        values.fill_(1.0)
        _settle(device)
        begin = time.perf_counter()
        dist.all_reduce(values, async_op=True).wait(_PATIENCE)
        _settle(device)
        taken.append(time.perf_counter() - begin)
    total = int(values[-1])
    if total != dist.get_world_size():
        raise RuntimeError(f"an all-reduce of ones over {dist.get_world_size()} ranks gave {total}")
    return AllReduceSpeed(dist.get_world_size(), values.nbytes, min(taken[1:]))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
