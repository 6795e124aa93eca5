"""The check that weights are on the device and do not wait in host memory (see `parallel/offload.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def require_resident(tensors: Iterable[Tensor], *, what: str) -> None:
    """Checks that all tensors have their memory. Reading one without would give garbage, or end the process.

    Args:
        what: the work that needs them, for the message.

    Raises:
        RuntimeError: the memory of one of them is released.
    """
    if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in tensors):
        raise RuntimeError(f"{what}: the trainer's weights or optimizer state are offloaded; reload them first")
