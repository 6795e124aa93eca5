"""Small agreements between all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def from_rank_zero(work: Callable[[], Value]) -> Value:
    """Calls `work` on rank 0 alone and returns its result on every rank; a collective over all ranks."""
    box: list[Any] = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    result: Value = box[0]
    return result


def any_rank(flag: bool, *, device: torch.device) -> bool:
    """Returns True on every rank if `flag` is true on some; a collective over all ranks."""
    raised = torch.tensor(int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())
