"""The resident memory of every process of a run, step by step: it does not grow."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from tests.proofs.runs import ROOT, VPPO
from tests.reliability.settings import PROJECT, arguments, long_settings
from tests.reliability.victims import RANK, role_of
from tests.system.marked import processes_with

NAME = "memory"
WARMUP = 1 / 3
"""The share of the steps in which memory may still grow: buffers and caches that are filled once. vLLM's engine on CPU
keeps something for each number of tokens that it meets, which takes 150 steps to meet them all."""
BLOCKS = 10
"""The number of stretches whose means the line is drawn through. Memory of one step is close to that of the next, so
single steps would make the noise look smaller than it is."""
RISE_STEPS = 5
"""The fewest steps before and after a rise that show it."""
FEWEST_STEPS = 2 * BLOCKS
NOISE = 3.0
"""Standard errors of the slope that may be chance."""
SMALL_MIB = 1.0
"""The growth from the first step to the last that is none in any case: a page here and there."""


_OTHERS = {
    "multiprocessing.resource_tracker": "resource tracker",
    "rollout.engine_process": "engine's watchdog",
}
"""A part of the command of a process that is nobody's victim, and its name."""


@dataclass(frozen=True)
class Growth:
    """A line through the memory of one process."""

    name: str
    mean_mib: float
    slope_kib: float
    """KiB per step."""
    error_kib: float
    """Standard error of the slope."""
    steps: int
    without_rise: Growth | None = None
    """The line after the largest lasting rise is taken away. Something may be loaded once: pylatexenc, by which
    MathRuler reads answers, imports its tables of LaTeX commands when the first such answer comes."""

    @property
    def is_flat(self) -> bool:
        if self.without_rise is not None and self.without_rise.is_flat:
            return True
        return self.slope_kib < NOISE * self.error_kib or self.slope_kib * self.steps / 1024 < SMALL_MIB


def growth_of(name: str, memory_mib: Sequence[float]) -> Growth:
    """Draws a line through the memory of a process after each step, without the warm-up."""
    kept = list(memory_mib)[round(WARMUP * len(memory_mib)) :]
    return dataclasses.replace(
        _line(name, _block_means(kept), steps=len(kept)),
        without_rise=_line(name, _block_means(_without_rise(kept)), steps=len(kept)),
    )


def _without_rise(memory_mib: Sequence[float]) -> list[float]:
    """Takes away the one lasting rise that explains most besides a line: from there on, all is lower by it.

    The line is fitted together with the rise, so that neither a leak nor a peak that goes back is taken for one.
    """
    memory, steps = np.asarray(memory_mib), np.arange(len(memory_mib))
    fits = []
    for at in range(RISE_STEPS, len(memory) - RISE_STEPS + 1):
        columns = np.stack([np.ones_like(steps), steps, steps >= at], axis=1).astype(np.float64)
        weights, *_ = np.linalg.lstsq(columns, memory)
        fits.append((float(((memory - columns @ weights) ** 2).sum()), at, float(weights[2])))
    _, at, rise = min(fits)
    return (memory - max(0.0, rise) * (steps >= at)).tolist()


def _block_means(memory_mib: Sequence[float]) -> list[float]:
    size = len(memory_mib) // BLOCKS
    return [_mean(memory_mib[i * size : (i + 1) * size]) for i in range(BLOCKS)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _line(name: str, means: Sequence[float], *, steps: int) -> Growth:
    middle, mean, size = (BLOCKS - 1) / 2, _mean(means), steps // BLOCKS
    spread = sum((i - middle) ** 2 for i in range(BLOCKS))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(means)) / spread
    rest = sum((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(means))
    error = math.sqrt(rest / (BLOCKS - 2) / spread)
    return Growth(name, mean, 1024 * slope / size, 1024 * error / size, steps)


def run(options: argparse.Namespace, digits: Path, scratch: Path) -> tuple[str, list[str]]:
    """Runs `--steps` steps on this machine. Returns the table and the faults."""
    scratch.mkdir()
    measured = _measured(digits, scratch, options.steps)
    lines = ["| process | RSS, MiB | KiB per step | standard error | |", "|---|---|---|---|---|"]
    for growth in measured:
        verdict = "flat" if growth.is_flat else "GROWS"
        numbers = f"{growth.mean_mib:.1f} | {growth.slope_kib:+.2f} | {growth.error_kib:.2f}"
        lines.append(f"| {growth.name} | {numbers} | {verdict} |")
    lines.append(f"\n{options.steps} steps with 30 checkpoints; the first {WARMUP:.0%} left out")
    return "\n".join(lines), [f"{growth.name} grows" for growth in measured if not growth.is_flat]


def run_folder(scratch: Path) -> Path:
    """Returns the folder of the run of `run`, which may not be there.

    Args:
        scratch: the folder of all parts.
    """
    return scratch / NAME / "runs" / PROJECT / NAME


def _measured(digits: Path, scratch: Path, steps: int) -> list[Growth]:
    mark = f"mark of {scratch}"
    series: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    with subprocess.Popen(
        [*VPPO, *arguments(digits, scratch / "runs", NAME, *long_settings(steps))], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "VPPO_TEST_MARK": mark},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        text = []
        for line in process.stdout:
            text.append(line)
            if line.startswith("step "):
                for pid in processes_with(mark):
                    _add(series, pid)
    assert process.returncode == 0, "".join(text[-50:])
    whole = [(name, values) for (_, name), values in sorted(series.items()) if len(values) >= 0.95 * steps]
    (scratch / "rss_mib.json").write_text(json.dumps(whole))
    return [growth_of(name, values) for name, values in whole]


def _add(series: defaultdict[tuple[int, str], list[float]], pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        series[pid, _name_of(process)].append(process.memory_info().rss / 2**20)


def _name_of(process: psutil.Process) -> str:
    """Returns what a process is, for the table."""
    role = role_of(process)
    if role == RANK:  # the command that starts the ranks has the same name and no number
        number = process.environ().get("RANK")
        return "launcher" if number is None else f"rank {number}"
    command = " ".join(process.cmdline())
    return role or next((name for part, name in _OTHERS.items() if part in command), command[:60])
