"""A piece of work that one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def from_rank_zero(work: Callable[[], Value]) -> Value:
    """Calls `work` on rank 0 alone and returns its result on every rank; a collective over all ranks."""
    box: list[Any] = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    result: Value = box[0]
    return result
