"""Processes that we start: the environment of those that are no trainer rank, and their end with their parent's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_PACKAGE_PARENT = Path(__file__).absolute().parents[2]


def child_environment() -> dict[str, str]:
    """Returns the environment of a process that runs a module of this package and is not a trainer rank.

    It is this process's environment without the launcher's variables, which libraries would take for the child's own
    rank, and with this package on the import path.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), environment.get("PYTHONPATH")]))
    return environment


def children_of(pid: int) -> list[int]:
    """Returns the processes that a process has started and that have not ended (Linux)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"\nPPid:\t{pid}\n" in status.read_text(errors="replace"):  # names are any bytes
                found.append(int(status.parent.name))
    return found


def die_with_parent(parent_pid: int) -> None:
    """Asks the kernel to kill this process when its parent ends, however that happens (Linux). Call it first.

    Args:
        parent_pid: the parent's own `os.getpid()`, to notice that it ended before this call.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        os._exit(1)
