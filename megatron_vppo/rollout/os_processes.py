"""Questions to the operating system about the processes of an engine (Linux).

Zombies do not count as alive: on a machine where nobody reaps orphans they stay for ever.
"""

from __future__ import annotations

import os
from pathlib import Path


def parent_of(pid: int) -> int | None:
    """Returns the parent of a process; None if the process is gone."""
    fields = _stat_fields(pid)
    return int(fields[1]) if fields else None


def members(group: int) -> list[int]:
    """Lists the processes of a group (setpgid) that are alive."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if (fields := _stat_fields(pid)) and int(fields[2]) == group and fields[0] != "Z"]


def unlink_shared_memory(group: int) -> None:
    """Removes the names of the segments in /dev/shm that the group has mapped.

    The segments themselves stay until the group ends, however it ends, and are freed then. No process can open them any
    more, so this is for segments that all users have opened.
    """
    paths = set()
    for pid in members(group):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
        except OSError:  # it has ended meanwhile
            continue
        paths |= {line.split(maxsplit=5)[5] for line in lines if any(p in line for p in SHARED_MEMORY)}
    for path in paths:
        Path(path).unlink(missing_ok=True)  # "... (deleted)" where another has unlinked it


def unlink_segments_named_in(folder: Path) -> None:
    """Removes the names of the segments in /dev/shm that an engine with this temporary folder has left.

    vLLM's CPU workers find one another by a file vllm_dist_<id> in it, and the names of their segments begin with that.
    """
    for file in folder.glob("vllm_dist_*"):
        for segment in Path("/dev/shm").glob(f"{file.name}*"):
            segment.unlink(missing_ok=True)


SHARED_MEMORY = ("/dev/shm/vllm_dist_", "/dev/shm/psm_")
"""The segments by which vLLM's CPU workers exchange tensors and messages. vLLM 0.32 always leaves the first behind, and
the second if Python's resource tracker is killed as well. All are opened by the time the engine is ready."""


def _stat_fields(pid: int) -> list[str]:
    """Reads a process's state, parent, group, ...; empty if the process is gone."""
    try:
        # the second field is the command in brackets, which may itself hold spaces and brackets
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
