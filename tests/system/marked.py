"""The processes of a test: those that inherited a mark of its own in their environment, whoever started them."""

from __future__ import annotations

import time
from pathlib import Path


def processes_with(mark: str) -> dict[int, str]:
    """Process id -> command line, its arguments ended by NUL."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:  # gone meanwhile
            continue
    return found


def parent_of(pid: int) -> int | None:
    """The process that started it; None if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return int(status.partition("\nPPid:\t")[2].split()[0])


def wait_until_gone(mark: str, timeout_seconds: float = 20) -> None:
    """Until nothing with the mark is left: ranks, engine, workers, their helpers."""
    deadline = time.monotonic() + timeout_seconds
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"left behind: {left}"
