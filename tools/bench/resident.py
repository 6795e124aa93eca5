"""The memory of a process and all its descendants together, sampled from /proc while they run (Linux)."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from bench.process_memory import process_tree


@dataclass(frozen=True)
class TreePeak:
    """The largest sums over all processes in one sample, in MiB. Shared pages count in every process."""

    resident: float
    anonymous: float
    """The heap and buffers."""
    mapped: float
    """The pages of mapped files, libraries included, which the kernel can take back."""
    processes: int
    """The largest number at one time."""


class TreeSampler:
    """Follows the process `root` and all its descendants from a thread until `stop`."""

    def __init__(self, root: int, *, interval_seconds: float = 0.1) -> None:
        self._root = root
        self._interval = interval_seconds
        self._peak = TreePeak(0.0, 0.0, 0.0, 0)
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> TreePeak:
        self._stop.set()
        self._thread.join()
        return self._peak

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            sums = {"RssAnon": 0.0, "RssFile": 0.0, "RssShmem": 0.0}
            tree = process_tree(self._root)
            for pid in tree:
                for field, mib in _resident(pid).items():
                    sums[field] += mib
            peak = self._peak
            self._peak = TreePeak(
                max(peak.resident, sum(sums.values())),
                max(peak.anonymous, sums["RssAnon"]),
                max(peak.mapped, sums["RssFile"] + sums["RssShmem"]),
                max(peak.processes, len(tree)),
            )
            self.samples += 1


def _resident(pid: int) -> dict[str, float]:
    """Reads the resident memory of a process by kind, in MiB; {} if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith("Rss"))
    return {field: int(value.split()[0]) / 1024 for field, value in pairs}
