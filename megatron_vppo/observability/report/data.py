"""The data of the report, read from a run folder that may be unfinished, damaged or empty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vppo.observability.json_lines import number
from megatron_vppo.observability.metrics import read_metrics

LARGEST = 1e300
"""The bound of the values that are drawn, so that sums and axes stay finite, too."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over steps, finite values only."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    dropped: int = 0
    """The number of NaN and infinite values, which were logged but cannot be drawn."""


@dataclass(frozen=True, slots=True)
class RunData:
    folder: Path
    config: Mapping[str, Any]
    """The resolved settings; {} if there is no readable config.yaml."""
    config_text: str
    """config.yaml as it is."""
    rows: Sequence[Mapping[str, float]]
    """The lines of metrics.jsonl in step order."""

    def series(self, name: str) -> Series:
        return _series([(int(row["step"]), row[name]) for row in self.rows if name in row])

    def setting(self, dotted: str) -> Any:
        """Returns a setting of the resolved config, or None if it is missing."""
        value: Any = self.config
        for key in dotted.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value

    def number_setting(self, dotted: str) -> float | None:
        """Returns a setting that is a finite number, or None."""
        value = self.setting(dotted)
        parsed = None if isinstance(value, str) else number(value)
        return parsed if parsed is not None and math.isfinite(parsed) else None

    def names(self, prefix: str) -> list[str]:
        """Lists the metric names with this prefix, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix)))


def load_run(run_dir: str | Path) -> RunData:
    """Reads a run folder.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}: give the folder that holds metrics.jsonl")
    path = folder / "config.yaml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2026-13-45
        config = None
    return RunData(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        rows=read_metrics(folder),
    )


def ratio(run: RunData, numerator: str, denominator: str) -> Series:
    """Computes numerator / denominator at the steps that have both."""
    both = [
        (int(row["step"]), row[numerator] / row[denominator])
        for row in run.rows
        if numerator in row and row.get(denominator)
    ]
    return _series(both)


def rest_of_step(run: RunData, shown: Iterable[str]) -> Series:
    """Computes timing_s/step minus the named phases, never below zero."""
    names = tuple(shown)
    rest = [
        (int(row["step"]), max(row["timing_s/step"] - sum(row.get(name, 0.0) for name in names), 0.0))
        for row in run.rows
        if "timing_s/step" in row
    ]
    return _series(rest)


def _series(points: Sequence[tuple[int, float]]) -> Series:
    finite = [(step, value) for step, value in points if abs(value) < LARGEST]
    return Series(tuple(step for step, _ in finite), tuple(v for _, v in finite), len(points) - len(finite))
