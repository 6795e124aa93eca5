"""The terminal display of a run: a live line while a step runs, and a line that stays when it has ended.

    step 3/30  reward 0.52  acc 0.55  kept 40/48  len 31.2  | rollout 4.1s score 1.0s update 3.2s | 8.7s/step, ETA 3:56

If the output is not a terminal (a log file, CI), only the lines that stay are printed.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from megatron_vppo.observability.phases import PHASES

LABELS = {phase.span: phase.label for phase in PHASES}
"""Span -> the word on the line. Spans that belong to no phase appear under their own name."""

SHORTEST_SECONDS = 0.05
"""Phases that are shorter do not appear on the line. metrics.jsonl has them."""

ETA_STEPS = 10
"""The number of steps whose mean wall time predicts the rest. It includes validation, but not checkpoints."""


class Progress:
    """The display. A thread of its own redraws the live line; all calls must come from one other thread."""

    def __init__(self, *, total_steps: int | None, stream: TextIO | None = None, refresh_seconds: float = 0.2) -> None:
        """
        Args:
            total_steps: the number of the last step; None: unknown, so that no ETA is shown.
            stream: where the lines go; None: standard output.
            refresh_seconds: the time between two drawings of the live line.
        """
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._refresh = refresh_seconds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._step_began = 0.0
        self._phases: list[tuple[str, float]] = []
        self._wall: deque[float] = deque(maxlen=ETA_STEPS)

    def begin_step(self, step: int) -> None:
        with self._lock:
            self._step, self._step_began, self._phases = step, time.perf_counter(), []
        if self._live and self._thread is None:
            self._thread = threading.Thread(target=self._keep_drawing, name="progress", daemon=True)
            self._thread.start()

    def begin_phase(self, name: str) -> None:
        with self._lock:
            self._phases.append((LABELS.get(name, name), time.perf_counter()))

    def end_phase(self) -> None:
        with self._lock:
            if self._phases:
                self._phases.pop()

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the line that stays."""
        if step > 0:  # step 0 only validates, so that its time predicts no other step
            self._wall.append(metrics["timing_s/step"])
        line = step_line(step, metrics, total_steps=self._total, mean_seconds=self._mean_wall())
        with self._lock:
            self._phases = []
            self._step_began = 0.0
            self._stream.write(("\r\x1b[K" if self._live else "") + line + "\n")
            self._stream.flush()

    def abandon_step(self) -> None:
        """Removes the live line of a step that failed, so that the error stands alone."""
        with self._lock:
            self._phases = []
            self._step_began = 0.0
            if self._live:
                self._stream.write("\r\x1b[K")
                self._stream.flush()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _mean_wall(self) -> float | None:
        return sum(self._wall) / len(self._wall) if self._wall else None

    def _keep_drawing(self) -> None:
        while not self._stop.wait(self._refresh):
            with self._lock:
                if self._step_began:
                    self._stream.write("\r\x1b[K" + self._live_line())
                    self._stream.flush()

    def _live_line(self) -> str:
        now = time.perf_counter()
        phase = f"{self._phases[-1][0]} {now - self._phases[-1][1]:.0f}s" if self._phases else "..."
        line = f"{_step_of(self._step, self._total)}  {phase}  ({now - self._step_began:.0f}s in this step)"
        return line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be taken back


def step_line(step: int, metrics: Mapping[str, float], *, total_steps: int | None, mean_seconds: float | None) -> str:
    """Writes the line that stays. Numbers that the step does not have are left out.

    Args:
        metrics: the step's metrics; docs/metrics.md has names and units.
        total_steps: the number of the last step; None: unknown.
        mean_seconds: mean time of the last steps, for the ETA; None: no step has ended yet.
    """
    parts = [_step_of(step, total_steps)]
    for label, name, digits in (
        ("reward", "critic/score/mean", 2),
        ("acc", "reward/accuracy", 2),
        ("val", "val/accuracy", 3),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:.{digits}f}")
    if "rollout/kept_groups" in metrics and "rollout/sampled_groups" in metrics:
        parts.append(f"kept {metrics['rollout/kept_groups']:.0f}/{metrics['rollout/sampled_groups']:.0f}")
    if "response_length/mean" in metrics:
        parts.append(f"len {metrics['response_length/mean']:.1f}")
    if metrics.get("rollout/skipped_steps"):
        parts.append("skipped: no group had right and wrong answers")
    line = "  ".join(parts)
    phases = _phases_of(metrics)
    if phases:
        line += "  | " + " ".join(f"{label} {seconds:.1f}s" for label, seconds in phases.items())
    line += f" | {metrics['timing_s/step']:.1f}s/step"
    if total_steps is not None and mean_seconds is not None and step < total_steps:
        line += f", ETA {clock((total_steps - step) * mean_seconds)}"
    return line


def clock(seconds: float) -> str:
    """Writes a duration as 3:56, or as 1:03:56 from an hour on. Parts of a second are rounded up."""
    whole = math.ceil(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _phases_of(metrics: Mapping[str, float]) -> dict[str, float]:
    phases: dict[str, float] = {}
    for name, seconds in metrics.items():
        group, _, span = name.partition("/")
        if group == "timing_s" and span != "step":
            label = LABELS.get(span, span)
            phases[label] = phases.get(label, 0.0) + seconds
    return {label: seconds for label, seconds in phases.items() if seconds >= SHORTEST_SECONDS}


def _step_of(step: int, total_steps: int | None) -> str:
    return f"step {step}" if total_steps is None else f"step {step}/{total_steps}"
