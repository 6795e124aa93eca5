"""A progress line for copied bytes: redrawn on a terminal, printed once at the end elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from megatron_vppo.observability.progress import clock
from megatron_vppo.system.visible import visible

GB = 1e9


class ByteProgress:
    """A progress line that is drawn by the thread that reports bytes."""

    def __init__(
        self, label: str, total_bytes: int, *, stream: TextIO | None = None, refresh_seconds: float = 0.2
    ) -> None:
        """
        Args:
            label: the first words of the line.
            stream: where the line is drawn; None: standard error.
            refresh_seconds: the shortest time between two drawings.
        """
        self._label = visible(label)  # with the name of a folder in it
        self._total = total_bytes
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._refresh = refresh_seconds
        self._began = self._drawn = time.perf_counter()
        self._done = 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.perf_counter()
        if self._live and now - self._drawn >= self._refresh:
            self._drawn = now
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be taken back
            self._stream.write("\r\x1b[K" + self._line(now)[:width])
            self._stream.flush()

    def close(self) -> None:
        """Prints the line that stays."""
        self._stream.write(("\r\x1b[K" if self._live else "") + self._line(time.perf_counter()) + "\n")
        self._stream.flush()

    def _line(self, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        share = self._done / self._total if self._total else 1.0
        line = f"{self._label}  {share:4.0%}  {self._done / GB:.2f}/{self._total / GB:.2f} GB"
        line += f"  {self._done / seconds / GB:.2f} GB/s  {clock(seconds)}"
        return line if share >= 1 or not self._done else line + f", ETA {clock(seconds / share - seconds)}"
