"""Seconds per phase and tokens per second, from the lines of a run's metrics.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from megatron_vppo.observability.phases import PHASES, VALIDATE

EVERY_STEP = tuple(phase.span for phase in PHASES if phase is not VALIDATE)
"""The spans of the phases that every step has."""
ONCE = (VALIDATE.span,)
"""Spans that not every step has. They are subtracted from the time of a step."""

Line = Mapping[str, float]


def measured_lines(lines: Sequence[Line], *, warmup: int, steps: int) -> list[Line]:
    """Picks the lines of the `steps` training steps that follow the first `warmup`.

    Raises:
        ValueError: the run ended earlier, or a measured step trained on nothing.
    """
    training = [line for line in lines if line["step"] >= 1]
    measured = training[warmup : warmup + steps]
    if len(measured) < steps:
        raise ValueError(f"the run logged {len(training)} training steps, but {warmup} + {steps} are needed")
    empty = [int(line["step"]) for line in measured if "timing_s/update_actor" not in line]
    if empty:
        raise ValueError(
            f"steps {empty} trained on nothing: every group was dropped. Set algorithm.online_filtering=false"
        )
    return measured


def phase_seconds(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Computes the median, minimum and maximum of each phase over the lines.

    'step' is the whole step without validation and checkpoints; 'other' is the part of it that is in no phase.
    """
    series: dict[str, list[float]] = {
        phase: [line[f"timing_s/{phase}"] for line in lines if f"timing_s/{phase}" in line] for phase in EVERY_STEP
    }
    series["step"] = [step_seconds(line) for line in lines]
    series["other"] = [
        step_seconds(line) - sum(line.get(f"timing_s/{phase}", 0.0) for phase in EVERY_STEP) for line in lines
    ]
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in series.items()
        if values
    }


def step_seconds(line: Line) -> float:
    return line["timing_s/step"] - sum(line.get(f"timing_s/{name}", 0.0) for name in ONCE)


def startup_seconds(lines: Sequence[Line], *, started: float) -> float:
    """Returns the time from the command to the first step: imports, models, engine, data set, first weight transfer.

    Args:
        started: Unix seconds when the command was started.
    """
    first = lines[0]
    return first["time"] - first["timing_s/step"] - started


def median(lines: Sequence[Line], name: str) -> float:
    return statistics.median(line[name] for line in lines)
