"""Failures of the processes that write a checkpoint, told on every rank with the folder and the reason."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

_SHORT_WRITE = "unexpected pos"
"""A part of the error of torch's archive writer where the disk took less than it was given."""
_FULL = ("No space left on device", "Disk quota exceeded", _SHORT_WRITE)


@contextmanager
def naming_failed_writes(target: Path) -> Iterator[None]:
    """Says what went wrong while `target` was being written, the same on every rank.

    Megatron's error has the reason on one rank only, as one line among the frames of several processes. All ranks raise
    it at the same point, so they can tell each other.

    Raises:
        ValueError: the disk is full.
        RuntimeError: another failure.
    """
    try:
        yield
    except CheckpointException as error:
        own = {rank: str(failure[0]) for rank, failure in error.failures.items()}
        gathered: list[dict[int, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
        reasons = {rank: reason for part in gathered for rank, reason in part.items()}
        raise _explained(target, reasons) from error


def _explained(target: Path, reasons: dict[int, str]) -> ValueError | RuntimeError:
    if any(text in reason for reason in reasons.values() for text in _FULL):
        disk = target.absolute().parent
        free = f"{shutil.disk_usage(disk).free / 1e9:.2f} GB are free in {disk}"
        return ValueError(
            f"{target}: {os.strerror(errno.ENOSPC)}; {free}. Make room and start again: the run goes on from the "
            "checkpoint before this one"
        )
    rank = min(reasons, default=None)
    why = "unknown reason" if rank is None else f"rank {rank}: {reasons[rank]}"
    return RuntimeError(f"{target} could not be written: {why}")
