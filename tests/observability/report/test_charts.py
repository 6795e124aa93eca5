"""Charts that no page of a single run has: lines with a band. test_page.py has the others."""

from __future__ import annotations

import re

from megatron_vppo.observability.report.charts import Chart, Line, chart_html
from megatron_vppo.observability.report.data import Series
from megatron_vppo.observability.report.scales import step_axis


def test_a_band_lies_behind_all_lines_and_within_the_axis() -> None:
    steps = (1, 2, 3)
    low, high = Series(steps, (-1.0, 0.0, 0.5)), Series(steps, (1.0, 1.0, 1.0))
    lines = (
        Line("a", Series(steps, (0.0, 0.5, 0.75)), 3, band=(low, high)),
        Line("b", Series(steps, (0.5, 0.5, 0.5)), 4),
    )
    html = chart_html(Chart("Reward", "", lines), step_axis(steps))
    # Steps 1..3 with half a step of room: 1/6, 1/2, 5/6 of the width; the axis goes from -1 to 1, as the band does.
    assert re.findall(r'<path class="(band|line)" style="--c:var\(--c(\d)\)" d="([^"]*)"', html) == [
        ("band", "3", "M166.7 1000.0 500.0 500.0 833.3 250.0 833.3 0.0 500.0 0.0 166.7 0.0Z"),
        ("line", "4", "M166.7 250.0 500.0 250.0 833.3 250.0"),
        ("line", "3", "M166.7 500.0 500.0 250.0 833.3 125.0"),
    ]
