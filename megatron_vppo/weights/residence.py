"""Whether weights are on the device, or waiting in host memory (see `parallel/offload.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def require_resident(tensors: Iterable[Tensor], *, what: str) -> None:
    """RuntimeError if the memory of one of them is away: reading it would give garbage, or end the process."""
    if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in tensors):
        raise RuntimeError(f"{what}: the trainer's weights or optimizer state are offloaded; reload them first")
