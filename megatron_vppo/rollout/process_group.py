"""Who is still alive in a process group. Zombies do not count: where nobody reaps orphans they stay for ever."""

from __future__ import annotations

import os
from pathlib import Path


def parent_of(pid: int) -> int | None:
    """None if the process is gone."""
    fields = _stat_fields(pid)
    return int(fields[1]) if fields else None


def members(group: int) -> list[int]:
    """Processes of the group, zombies left out."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if (fields := _stat_fields(pid)) and int(fields[2]) == group and fields[0] != "Z"]


def unlink_shared_memory(group: int) -> None:
    """Take the names off the segments in /dev/shm that the group has mapped; they live on until it ends.

    For segments that are complete and never opened again: whatever ends the group then frees them.
    """
    paths = set()
    for pid in members(group):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        paths |= {line.split(maxsplit=5)[5] for line in lines if any(p in line for p in SHARED_MEMORY)}
    for path in paths:
        Path(path).unlink(missing_ok=True)  # "... (deleted)" where another has unlinked it


SHARED_MEMORY = ("/dev/shm/vllm_dist_", "/dev/shm/psm_")
"""Segments by which vLLM's CPU workers exchange tensors (vLLM 0.32 always leaves them behind) and messages (left behind
where Python's resource tracker is killed as well). All are attached once the engine is ready."""


def _stat_fields(pid: int) -> list[str]:
    """State, parent, process group, ...; empty if the process is gone."""
    try:
        # the second field is the command in brackets, which may itself hold spaces and brackets
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
