"""Charts as static HTML: an SVG that stretches to its box, with labels in HTML around it, so that text is never scaled.

Coordinates in the SVG are 0 to 1000 in both directions; strokes keep their width (`vector-effect`). page.js reads the
hover values from the JSON next to each chart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vppo.observability.report.data import Series
from megatron_vppo.observability.report.scales import Axis, log_axis, show, tick_labels, value_axis
from megatron_vppo.observability.report.text import html_text, plain_text

SMOOTH_FROM = 80
"""Lines with at least this many points are drawn smoothed, over their faint raw values."""

DOTS_UP_TO = 40
"""Lines with at most this many points have a dot on each."""

MAX_BARS = 75
"""The largest number of bars of a stack. In longer runs each bar shows the mean of several steps."""


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    series: Series
    color: int
    """The slot of the palette in page.css, 1 to 8; 0: neutral."""
    band: tuple[Series, Series] | None = None
    """The lower and upper bound of the values, shaded behind the line, at the steps of `series`."""
    dashed: bool = False
    """True to tell it from another line of its colour."""


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    unit: str
    """The unit of the vertical axis, as printed. 'fraction' prints per cent."""
    lines: tuple[Line, ...]
    scale: str = "auto"
    """The vertical axis: 'auto' (range of the values), 'zero' (from zero), 'log' (decades) or 'stack' (stacked)."""
    reference: tuple[str, float] | None = None
    """A dashed line, as label and value."""
    wide: bool = False
    """True for a chart twice as wide as the others, if the window allows it."""


def chart_html(chart: Chart, steps: Axis) -> str:
    """Draws a chart on the step axis that all charts of a page share. A chart without any value says 'no data'."""
    lines = [line for line in chart.lines if line.series.steps]
    unit = "%" if chart.unit == "fraction" else chart.unit
    if chart.scale == "stack" and lines and (size := _bars(lines)[1]) > 1:
        unit += f", mean of {size} steps"
    head = f'<figcaption><h3>{html_text(chart.title)}</h3><span class="unit">{html_text(unit)}</span></figcaption>'
    kind = "chart wide" if chart.wide else "chart"
    if not lines:
        return f'<figure class="{kind} empty">{head}<div class="nodata">no data</div></figure>'
    axis = _value_axis(chart, lines)
    drawn = [line for line in lines if not axis.log or any(value > 0 for value in line.series.values)]
    if chart.scale == "stack":
        body = _stack(lines, steps, axis)
    else:
        body = "".join(_band(line.band, line.color, steps, axis) for line in drawn if line.band is not None)
        body += "".join(_line(line, steps, axis) for line in reversed(drawn))  # the first line is drawn last, on top
    if chart.reference is not None and axis.low <= chart.reference[1] <= axis.high:
        y = _y(axis, chart.reference[1])
        body += f'<path class="reference" d="M0 {y}H1000"/>'
    legend = "".join(_legend_item(line, chart.unit) for line in lines)
    if chart.reference is not None:
        label, value = chart.reference
        legend += f'<li><i class="dash"></i>{html_text(label)} <b>{show(value, chart.unit)}</b></li>'
    dropped = sum(line.series.dropped for line in lines)
    if dropped:
        legend += f'<li class="warn">{dropped} NaN or infinite, not drawn</li>'
    return (
        f'<figure class="{kind}" tabindex="0" aria-label="{plain_text(_summary(chart, lines))}">{head}'
        f'<ul class="legend">{legend}</ul>{frame_html(body, steps, axis, unit=chart.unit, x_title="training step")}'
        f'<script type="application/json">{_hover_data(chart, lines, steps)}</script></figure>'
    )


def mark_html(color: int, *, hollow: bool) -> str:
    """Returns the mark of a line in a legend or a table; that of a dashed line is hollow."""
    kind = ' class="hollow"' if hollow else ""
    return f'<i{kind} style="--c:var(--c{color})"></i>'


def script_json(value: object) -> str:
    """Writes JSON that is safe inside a <script> element, whatever text it contains."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def smoothed(values: Sequence[float]) -> list[float]:
    """Smooths by an exponential mean over about a fortieth of the values, corrected for the bias at its start."""
    keep = 1 - 2 / (len(values) / 40 + 1)
    keep = max(keep, 0.0)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def _value_axis(chart: Chart, lines: Sequence[Line]) -> Axis:
    drawn = [series for line in lines for series in (line.series, *(line.band or ()))]
    values = [value for series in drawn for value in series.values]
    if chart.scale == "log":
        positive = [value for value in values if value > 0]
        if positive:
            return log_axis(positive + ([chart.reference[1]] if chart.reference else []))
    if chart.scale == "stack":
        values = [sum(heights) for heights in _bars(lines)[2].values()]
    elif chart.reference is not None:
        values.append(chart.reference[1])
    return value_axis(values, from_zero=chart.scale in ("zero", "stack", "log"))


def _line(line: Line, steps: Axis, axis: Axis) -> str:
    points = [(s, v) for s, v in zip(line.series.steps, line.series.values, strict=True) if not axis.log or v > 0]
    color, kind = f"--c:var(--c{line.color})", "line dashed" if line.dashed else "line"
    raw = _path(points, steps, axis)
    if len(points) >= SMOOTH_FROM:
        smooth = smoothed([value for _, value in points])
        path = _path([(step, value) for (step, _), value in zip(points, smooth, strict=True)], steps, axis)
        return f'<path class="raw" style="{color}" d="{raw}"/><path class="{kind}" style="{color}" d="{path}"/>'
    html = f'<path class="{kind}" style="{color}" d="{raw}"/>'
    if len(points) <= DOTS_UP_TO:
        # A path of zero length with round caps is a dot that does not stretch with the SVG.
        dots = "".join(f"M{_x(steps, step)} {_y(axis, value)}h0" for step, value in points)
        html += f'<path class="dots" style="{color}" d="{dots}"/>'
    return html


def _band(band: tuple[Series, Series], color: int, steps: Axis, axis: Axis) -> str:
    low, high = (list(zip(bound.steps, bound.values, strict=True)) for bound in band)
    return f'<path class="band" style="--c:var(--c{color})" d="{_path([*low, *reversed(high)], steps, axis)}Z"/>'


def _stack(lines: Sequence[Line], steps: Axis, axis: Axis) -> str:
    first, size, bars = _bars(lines)
    half = 0.36 * size * 1000 / (steps.high - steps.low)  # leaves a gap between neighbours
    below = dict.fromkeys(bars, 0.0)
    html = []
    for index, line in enumerate(lines):
        path = ""
        for bar, heights in bars.items():
            bottom, top = below[bar], below[bar] + heights[index]
            below[bar] = top
            if heights[index] > 0:
                left = round(_x(steps, first + (bar + 0.5) * size - 0.5) - half, 1)
                path += f"M{left} {_y(axis, bottom)}V{_y(axis, top)}h{2 * half:.1f}V{_y(axis, bottom)}Z"
        html.append(f'<path class="fill" style="--c:var(--c{line.color})" d="{path}"/>')
    return "".join(html)


def _bars(lines: Sequence[Line]) -> tuple[int, int, dict[int, list[float]]]:
    """Divides a stack into bars: the first step, the steps per bar, and each line's mean over the steps of each bar.

    If a line has no value at a step that others have, it counts as zero there: means are per step, so that heights add
    up.
    """
    every = sorted({step for line in lines for step in line.series.steps})
    size = -(-(every[-1] - every[0] + 1) // MAX_BARS)
    covered: dict[int, int] = {}
    for step in every:
        bar = (step - every[0]) // size
        covered[bar] = covered.get(bar, 0) + 1
    bars = {bar: [0.0] * len(lines) for bar in covered}
    for index, line in enumerate(lines):
        for step, value in zip(line.series.steps, line.series.values, strict=True):
            bar = (step - every[0]) // size
            bars[bar][index] += value / covered[bar]
    return every[0], size, bars


def frame_html(body: str, horizontal: Axis, axis: Axis, *, unit: str, x_title: str, x_unit: str = "") -> str:
    """Draws grid, labels and title around the paths in `body`. Units are as in `Chart`."""
    grid = "".join(f'<path class="grid" d="M0 {_y(axis, tick)}H1000"/>' for tick in axis.ticks)
    y_labels = "".join(
        f'<span style="bottom:{axis.place(tick) * 100:.2f}%">{html_text(label)}</span>'
        for tick, label in zip(axis.ticks, tick_labels(axis, unit), strict=True)
    )
    x_labels = "".join(
        f'<span style="left:{horizontal.place(tick) * 100:.2f}%">{html_text(label)}</span>'
        for tick, label in zip(horizontal.ticks, tick_labels(horizontal, x_unit), strict=True)
    )
    return (
        f'<div class="plot"><div class="ylabels">{y_labels}</div><div class="area">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{grid}{body}</svg>'
        f'<div class="cursor"></div></div><div class="xlabels">{x_labels}</div>'
        f'<div class="xtitle">{html_text(x_title)}</div></div>'
    )


def _legend_item(line: Line, unit: str) -> str:
    latest = show(line.series.values[-1], unit)
    return f"<li>{mark_html(line.color, hollow=line.dashed)}{html_text(line.label)} <b>{latest}</b></li>"


def _summary(chart: Chart, lines: Sequence[Line]) -> str:
    parts = []
    for line in lines:
        s = line.series
        first, last = show(s.values[0], chart.unit), show(s.values[-1], chart.unit)
        parts.append(f"{line.label}: {first} at step {s.steps[0]}, {last} at step {s.steps[-1]}")
    return f"{chart.title} over training steps. " + "; ".join(parts)


def _hover_data(chart: Chart, lines: Sequence[Line], steps: Axis) -> str:
    every = sorted({step for line in lines for step in line.series.steps})
    series = []
    for line in lines:
        values = dict(zip(line.series.steps, line.series.values, strict=True))
        shown = [float(f"{values[step]:.5g}") if step in values else None for step in every]
        series.append({"label": line.label, "color": line.color, "values": shown})
    axis = {"low": steps.low, "high": steps.high, "steps": every}
    return script_json({**axis, "unit": chart.unit, "total": chart.scale == "stack", "series": series})


def _path(points: Sequence[tuple[int, float]], steps: Axis, axis: Axis) -> str:
    return "M" + " ".join(f"{_x(steps, step)} {_y(axis, value)}" for step, value in points) if points else ""


def _x(steps: Axis, step: float) -> float:
    return round(steps.place(step) * 1000, 1)


def _y(axis: Axis, value: float) -> float:
    return round(1000 - axis.place(value) * 1000, 1)
