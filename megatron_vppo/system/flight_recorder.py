"""NCCL's flight recorder: what each rank was doing when a collective on GPUs was out of time."""

from __future__ import annotations

import os
from pathlib import Path

ENTRIES = "2000"
"""The number of collectives that are remembered: a few steps of a model with many layers."""


def record_collectives(logs: Path) -> None:
    """Lets every rank write its last collectives to logs/nccl_trace_rank_N when one is out of time.

    torch reads these variables when the process group is made. What the user has set stays.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", ENTRIES)
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs / "nccl_trace_rank_"))
