"""Axes: ranges, tick positions and printed numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """A range with its ticks. `place` maps a value to [0, 1]."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def step_axis(steps: Sequence[int]) -> Axis:
    """Makes an axis of whole steps, with half a step of room on both sides. A single step stands in the middle."""
    low, high = min(steps), max(steps)
    stride = max(1, round(_nice_stride(max(high - low, 1) / 6)))
    ticks = tuple(float(t) for t in range(math.ceil(low / stride) * stride, high + 1, stride))
    return Axis(low - 0.5, high + 0.5, ticks)


def value_axis(values: Sequence[float], *, from_zero: bool) -> Axis:
    """Makes a linear axis whose ends are ticks.

    From zero, the axis of fractions ends at 1 at the latest, because 1 is a multiple of each stride up to 1.

    Args:
        from_zero: True to include zero, for amounts; False for the range of the values.
    """
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        # A constant: leave half its size above it, so that the line lies inside the chart.
        pad = abs(high) * 0.5 or 1.0
        low, high = (0.0, pad) if from_zero and high == 0 else (low - (0 if from_zero else pad), high + pad)
    stride = _nice_stride((high - low) / 4)
    first, last = math.floor(low / stride + 1e-9), math.ceil(high / stride - 1e-9)
    return Axis(first * stride, last * stride, tuple(i * stride for i in range(first, last + 1)))


def log_axis(values: Sequence[float]) -> Axis:
    """Makes a logarithmic axis of whole decades around positive values, with about six ticks at most."""
    first, last = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    first, last = min(max(first, -307), 307), max(min(last, 308), -306)  # the decades that floats hold
    stride = max(1, math.ceil((last - first) / 5))
    return Axis(10.0**first, 10.0**last, tuple(10.0**e for e in range(first, last + 1, stride)), log=True)


def show(value: float, unit: str) -> str:
    """Writes a number as a person would. The unit 'fraction' prints per cent."""
    if unit == "fraction":
        return f"{significant(value * 100, 3)}%"
    return significant(value, 4)


def tick_labels(axis: Axis, unit: str) -> list[str]:
    """Writes a label for each tick, with as many decimals as the distance between ticks needs."""
    if axis.log or len(axis.ticks) < 2:
        return [show(tick, unit) for tick in axis.ticks]
    factor, sign = (100, "%") if unit == "fraction" else (1, "")
    stride = (axis.ticks[1] - axis.ticks[0]) * factor
    largest = max(abs(tick) for tick in axis.ticks) * factor
    if largest < 1e-4 or largest >= 1e7:
        return [(significant(tick * factor, 3) if abs(tick) > stride * 1e-6 else "0") + sign for tick in axis.ticks]
    decimals = max(0, -math.floor(math.log10(stride) + 1e-9))
    return [f"{round(tick * factor, decimals) + 0.0:,.{decimals}f}{sign}".replace("-", "−") for tick in axis.ticks]


def significant(value: float, digits: int) -> str:
    """Writes a number with `digits` significant digits, but all of its whole part, and without trailing zeros.

    Examples with 3 digits: 0.124, 12.3, 4,520, 1.2e-6.
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent >= 7:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return ("−" if value < 0 else "") + f"{mantissa.lstrip('-')}e{int(power)}"
    text = f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def _nice_stride(rough: float) -> float:
    """Returns the smallest of 1, 2 and 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
