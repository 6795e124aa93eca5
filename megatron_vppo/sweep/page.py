"""The page of a sweep: the table of its results, curves with a band of one standard error, and its runs."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from megatron_vppo.observability.report.charts import Chart, Line, chart_html, mark_html
from megatron_vppo.observability.report.data import Series
from megatron_vppo.observability.report.document import document_html
from megatron_vppo.observability.report.scales import step_axis
from megatron_vppo.observability.report.text import html_text, plain_text
from megatron_vppo.observability.statistics import CONFIDENCE
from megatron_vppo.sweep.plan import Sweep
from megatron_vppo.sweep.results import ACCURACY, MeanCurve, SweepResults
from megatron_vppo.sweep.status import RunStatus
from megatron_vppo.sweep.table import COLUMNS, cells, notes

CHARTS = (
    (ACCURACY, "Held-out accuracy", "fraction", True),
    ("val/reward_score", "Held-out reward", "per response", False),
    ("critic/score/mean", "Reward in training", "per response", False),
    ("response_length/mean", "Response length in training", "tokens", False),
)
"""Metric, title, unit, and True for a wide chart."""
COLORS = 8
"""The colours of page.css. The ninth variant has the first one's again, dashed."""
READING = (
    "Accuracies are means over the seeds ± their standard error. Differences are over questions: each question's "
    "accuracy, averaged over its responses and over the seeds that both variants have, minus the baseline's; the "
    f"{CONFIDENCE:.0%} interval is a bootstrap over questions, p is that of a sign-flip test. They say how far the "
    "difference depends on which questions were asked. They do not say how far it depends on the seeds, for which the "
    "standard errors stand, and p is not corrected for the number of variants."
)


def render_sweep(sweep: Sweep, states: Mapping[str, RunStatus], results: SweepResults) -> str:
    """Writes the page as one HTML document."""
    done = sum(status.state == "finished" for status in states.values())
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    counts = f"{len(sweep.variants)} variants, {len(sweep.seeds)} seeds; {done} of {len(sweep.runs)} runs are finished."
    body = (
        f'<header class="page"><p class="eyebrow">sweep<span>report of {written}</span></p>'
        f'<h1>{html_text(sweep.name)}</h1><p class="result">{counts}</p></header><main>'
        f"{_section('results', 'Results', 'Is one variant better than the baseline?', _results(results))}"
        f"{_section('curves', 'Curves', 'Means over seeds; bands of one standard error.', _charts(results))}"
        f"{_section('runs', 'Runs', 'One that has finished has a report of its own.', _runs(sweep, states))}</main>"
    )
    return document_html(f"{sweep.name} · sweep", body, charts=True)


def _section(anchor: str, title: str, lead: str, content: str) -> str:
    return (
        f'<section id="{anchor}"><header class="sectionhead"><h2>{html_text(title)}</h2><p>{html_text(lead)}</p>'
        f"</header>{content}</section>"
    )


def _results(results: SweepResults) -> str:
    rows = []
    for index, variant in enumerate(results.variants):
        name, *rest = map(html_text, cells(results, variant))
        rows.append([f"{mark_html(_color(index), hollow=_again(index))}{name}", *rest])
    paragraphs = "".join(f'<p class="note">{html_text(note)}</p>' for note in [*notes(results), READING])
    return _table(COLUMNS, rows) + paragraphs


def _charts(results: SweepResults) -> str:
    steps = [step for variant in results.variants for curve in variant.curves.values() for step in curve.steps]
    if not steps:
        return '<p class="nodata">no step has ended yet</p>'
    axis = step_axis(steps)
    charts = []
    for metric, title, unit, wide in CHARTS:
        lines = [_line(variant.name, variant.curves[metric], index) for index, variant in enumerate(results.variants)]
        scale = "auto" if metric == ACCURACY else "zero"
        charts.append(chart_html(Chart(title, unit, tuple(lines), scale=scale, wide=wide), axis))
    return f'<div class="grid">{"".join(charts)}</div>'


def _line(name: str, curve: MeanCurve, index: int) -> Line:
    low = tuple(found.mean - (found.error or 0) for found in curve.estimates)
    high = tuple(found.mean + (found.error or 0) for found in curve.estimates)
    mean = Series(curve.steps, tuple(found.mean for found in curve.estimates))
    band = (Series(curve.steps, low), Series(curve.steps, high))
    return Line(name, mean, _color(index), band, dashed=_again(index))


def _runs(sweep: Sweep, states: Mapping[str, RunStatus]) -> str:
    rows = []
    for run in sweep.runs:
        status, name = states[run.name], html_text(run.name)
        if (run.folder / "report.html").exists():
            name = f'<a href="{plain_text(quote(run.name))}/report.html">{name}</a>'
        rows.append([name, html_text(status.state), "–" if status.step is None else str(status.step)])
    return _table(("run", "state", "steps"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table; its cells are HTML."""
    head = "".join(f"<th>{html_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="results"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _color(index: int) -> int:
    return 1 + index % COLORS


def _again(index: int) -> bool:
    """Returns True if a variant before has the same colour."""
    return index >= COLORS
