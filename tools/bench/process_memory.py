"""Peak resident memory of every process of a run, read from /proc while it runs (Linux)."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
ROLES = (
    ("megatron_vppo.rollout.engine_process", "engine"),
    ("megatron_vppo.data.reward_worker", "reward worker"),
    ("torch.distributed.run", "launcher"),
    ("multiprocessing.resource_tracker", "resource tracker"),
    ("multiprocessing.spawn", "worker"),
    ("multiprocessing.forkserver", "worker"),
)
"""A part of a command line, and the role of a process that has it."""


@dataclass(frozen=True)
class ProcessPeak:
    pid: int
    parent: int
    role: str
    peak_mib: float
    """The largest resident set so far (VmHWM). Shared pages count in every process."""


def process_tree(root: int) -> list[int]:
    """Lists `root` and its living descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree, waiting = [], [root] if _stat(root) else []
    while waiting:
        pid = waiting.pop(0)
        tree.append(pid)
        waiting += sorted(children.get(pid, []))
    return tree


def read_peak(pid: int) -> ProcessPeak | None:
    """Reads the peak memory of a process; None if it has ended."""
    fields = _stat(pid)
    try:
        status = (PROC / str(pid) / "status").read_text()
        command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        environment = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    peak = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None)
    if not fields or peak is None:  # a zombie has no memory
        return None
    rank = next((value[5:].decode() for value in environment if value.startswith(b"RANK=")), None)
    return ProcessPeak(pid, int(fields[1]), _role(command, rank), peak / 1024)


class MemorySampler:
    """Follows the process `root` and all its descendants from a thread until `stop`."""

    def __init__(self, root: int, *, interval_seconds: float = 1.0) -> None:
        self._root = root
        self._interval = interval_seconds
        self._peaks: dict[int, ProcessPeak] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> list[ProcessPeak]:
        """Ends the sampling and returns every process seen, in order of first samples.

        What a process took after its last sample is missed.
        """
        self._stop.set()
        self._thread.join()
        return list(self._peaks.values())

    def _follow(self) -> None:
        while True:
            for pid in process_tree(self._root):
                if seen := read_peak(pid):
                    self._peaks[pid] = _later(self._peaks.get(pid), seen)
            if self._stop.wait(self._interval):
                return


def by_role(peaks: list[ProcessPeak]) -> list[dict[str, Any]]:
    """Makes one entry per role, largest first: the number of such processes, and the peak of the largest.

    A process whose parent has the same role was forked by it: 'engine (forked)'.
    """
    role_of = {peak.pid: peak.role for peak in peaks}
    groups: dict[str, list[float]] = {}
    for peak in peaks:
        name = f"{peak.role} (forked)" if role_of.get(peak.parent) == peak.role else peak.role
        groups.setdefault(name, []).append(peak.peak_mib)
    entries = [{"role": role, "processes": len(all_), "peak_mib": round(max(all_), 1)} for role, all_ in groups.items()]
    return sorted(entries, key=lambda entry: -float(entry["peak_mib"]))


def _later(before: ProcessPeak | None, now: ProcessPeak) -> ProcessPeak:
    """Returns the higher of two samples of a process, or the second if the process has become another program."""
    return before if before and before.role == now.role and before.peak_mib > now.peak_mib else now


def _role(command: str, rank: str | None) -> str:
    """Names a process by its command line, and a trainer rank also by its variable RANK."""
    for part, role in ROLES:
        if part in command:
            return role
    if "megatron_vppo.cli.main" in command:
        return "vppo" if rank is None else f"trainer rank {rank}"
    return Path(command.split(" ")[0]).name


def _stat(pid: int) -> list[str]:
    """Reads /proc/PID/stat from the state on: state, parent, ...; [] if the process has ended."""
    try:  # the second field is the command in brackets, which may contain spaces and brackets
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
