"""Axes and printed numbers of the report, for runs of one step and of a thousand."""

from __future__ import annotations

import math
import random

import pytest

from megatron_vppo.observability.report.charts import smoothed
from megatron_vppo.observability.report.scales import log_axis, show, significant, step_axis, tick_labels, value_axis


@pytest.mark.parametrize(
    ("steps", "ticks"),
    [
        ([1], [1]),
        ([0, 1], [0, 1]),
        (range(0, 31), [0, 5, 10, 15, 20, 25, 30]),
        (range(1, 1001), [200, 400, 600, 800, 1000]),
        ([7, 8, 9], [7, 8, 9]),
    ],
)
def test_step_ticks_are_round_whole_steps(steps: range, ticks: list[int]) -> None:
    axis = step_axis(list(steps))
    assert list(axis.ticks) == ticks
    assert axis.place(min(steps)) > 0 and axis.place(max(steps)) < 1


def test_value_axes_hold_all_values_between_few_round_ticks() -> None:
    draw = random.Random(0)
    for _ in range(500):
        scale = 10 ** draw.uniform(-9, 9)
        values = [draw.gauss(draw.choice([0, 5]), 1) * scale for _ in range(draw.choice([1, 2, 50]))]
        axis = value_axis(values, from_zero=draw.random() < 0.5)
        assert 3 <= len(axis.ticks) <= 8, (values, axis)
        assert axis.low == axis.ticks[0] and axis.high == axis.ticks[-1]
        assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values), (values, axis)
        labels = tick_labels(axis, "nats")
        assert len(set(labels)) == len(labels), (axis, labels)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12])
def test_a_constant_has_an_axis(value: float) -> None:
    for from_zero in (True, False):
        axis = value_axis([value] * 3, from_zero=from_zero)
        assert 0 <= axis.place(value) <= 1 and axis.high > axis.low


def test_a_fraction_never_has_ticks_above_one() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        size = 10 ** draw.uniform(-6, 0)  # near zero, near one and in between
        values = [draw.choice([draw.random(), draw.random() * size, 1 - draw.random() * size]) for _ in range(3)]
        for high in (max(values), 1.0):
            axis = value_axis([*values, high], from_zero=True)
            assert axis.ticks[0] == 0.0 and high <= axis.high + 1e-12
            assert max(axis.ticks) <= 1.0, values
    assert tick_labels(value_axis([0.0, 0.75], from_zero=True), "fraction") == ["0%", "20%", "40%", "60%", "80%"]
    assert tick_labels(value_axis([0.0, 0.81], from_zero=True), "fraction") == ["0%", "50%", "100%"]


def test_log_ticks_are_decades() -> None:
    assert log_axis([3e-7, 2e-5]).ticks == (1e-7, 1e-6, 1e-5, 1e-4)
    assert log_axis([1.0]).low < 1.0 < log_axis([1.0]).high
    wide = log_axis([1e-12, 1e3])
    assert len(wide.ticks) <= 7 and wide.place(1e-12) == 0.0 and wide.place(1e3) == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[5e-324, 1.0], [1.0, 1.7e308], [5e-324], [1.7e308]])
def test_a_log_axis_of_the_smallest_and_largest_floats(values: list[float]) -> None:
    axis = log_axis(values)
    assert all(math.isfinite(axis.place(value)) for value in values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (12.3, "12.3"), (4520.0, "4,520"), (-0.5, "−0.5"), (1.25e-6, "1.25e-6"), (0.0, "0"),
     (-2e9, "−2e9"), (99999.5, "100,000")],
)  # fmt: skip
def test_numbers_are_short_and_readable(value: float, text: str) -> None:
    assert significant(value, 4) == text


def test_fractions_are_per_cent() -> None:
    assert show(0.41234, "fraction") == "41.2%"


def test_smoothing_keeps_a_constant_and_the_first_value() -> None:
    assert smoothed([2.0] * 500) == pytest.approx([2.0] * 500)
    noisy = [math.sin(i * 1.7) for i in range(400)]
    smooth = smoothed(noisy)
    assert smooth[0] == noisy[0] and max(map(abs, smooth[50:])) < 0.3
