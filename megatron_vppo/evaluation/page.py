"""The page of an evaluation: its figures next to those of other runs and of the paper, and its responses to browse."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files

from megatron_vppo.evaluation.browser import MAX_TOKENS, Shown, surprises
from megatron_vppo.evaluation.published import PublishedRow
from megatron_vppo.evaluation.results import EvalResults
from megatron_vppo.evaluation.table import (
    LEAK_NOTE,
    PUBLISHED_NOTE,
    Row,
    category_table,
    comparison_notes,
    comparison_table,
    figures_table,
    marked,
    percent,
    protocol,
    published_table,
    suite_notes,
    variants_table,
)
from megatron_vppo.observability.report.charts import script_json
from megatron_vppo.observability.report.document import document_html
from megatron_vppo.observability.report.scales import Axis, significant, tick_labels, value_axis
from megatron_vppo.observability.report.text import html_text, plain_text

COLORS = 8
"""The colours of page.css. The ninth run has the first one's again."""
_PLOTTED = "VPPO"
"""The published rows that the plot has: those of models whose name begins so."""
_READING = (
    "avg@n is the mean over questions of the share of their n samples that are right; intervals say how far another "
    "set of such questions would take it. docs/evaluation.md explains all columns."
)


def render_evaluation(results: EvalResults, shown: Shown) -> str:
    """Writes the page as one HTML document that refers to no other file."""
    folder = files(__package__)
    run = results.runs[0]
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body = (
        f'<header class="page"><p class="eyebrow">evaluation of {html_text(results.suite)}<span>{written}</span></p>'
        f'<h1>{html_text(run.name)}</h1><p class="result">{_result(results)}</p></header><main>'
        f"{''.join(_sections(results, shown))}</main>"
    )
    return document_html(
        f"{run.name} · {results.suite}",
        body,
        more_style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        more_script=folder.joinpath("page.js").read_text(encoding="utf-8"),
    )


def _result(results: EvalResults) -> str:
    run = results.runs[0]
    average = run.average
    if average is None:
        return f"{sum(one.questions for one in run.benchmarks.values()):,} questions so far; it is unfinished."
    over = f"over {len(run.benchmarks)} benchmarks, " if len(run.benchmarks) > 1 else ""
    return f"<b>{percent(average.mean)} %</b> {over}{average.count:,} questions, {run.config.rollout.n} samples each."


def _sections(results: EvalResults, shown: Shown) -> Iterator[str]:
    yield _section("overview", "Overview", "Mean accuracy of each benchmark with its 95 % interval.", _plot(results))
    runs = "".join(
        f"<h3>{_mark(number)}{html_text(run.name)}</h3><p class='note'>{html_text(run.model)}: "
        f"{html_text(protocol(run))}</p>{_table(*figures_table(results, run))}"
        for number, run in enumerate(results.runs)
    )
    leak = f'<p class="note">{LEAK_NOTE}</p>' if results.leaked else ""
    outside = "".join(f'<p class="note">{html_text(note)}</p>' for note in suite_notes(results))
    yield _section("figures", "Figures", _READING, runs + leak + outside)
    if results.comparisons:
        tables = "".join(
            f"<h3>{html_text(f'{results.runs[0].name} minus {one.other}')}</h3>{_table(*comparison_table(one))}"
            + "".join(f'<p class="note">{html_text(note)}</p>' for note in comparison_notes(one))
            for one in results.comparisons
        )
        yield _section("comparisons", "Comparisons", "Paired by question; p is that of a sign-flip test.", tables)
    if results.published:
        yield _section("published", "Published rows", PUBLISHED_NOTE, _table(*published_table(results)))
    if categories := "".join(_categories(results)):
        yield _section("categories", "Categories", "avg@n by what the benchmark says of its questions.", categories)
    yield _section("responses", "Responses", _left_out(shown), _browser(results, shown))


def _section(anchor: str, title: str, lead: str, content: str) -> str:
    return (
        f'<section id="{anchor}"><header class="sectionhead"><h2>{html_text(title)}</h2><p>{html_text(lead)}</p>'
        f"</header>{content}</section>"
    )


def _mark(number: int) -> str:
    return f'<i class="mark" style="--c:var(--c{number % COLORS + 1})"></i>'


def _table(head: Row, rows: Sequence[Row]) -> str:
    names = "".join(f"<th>{html_text(column)}</th>" for column in head)
    body = "".join(f"<tr>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="results"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _categories(results: EvalResults) -> Iterator[str]:
    for name, figures in results.runs[0].benchmarks.items():
        tables = [category_table(results, name, category) for category in figures.result.categories]
        if (variants := variants_table(results, name)) is not None:
            tables.append(variants)
        if tables:
            inside = "".join(_table(*table) for table in tables)
            yield f"<details><summary>{html_text(name)}</summary>{inside}</details>"


# --- Plot -------------------------------------------------------------------------------------------------------------


def _plot(results: EvalResults) -> str:
    """Draws a line for each benchmark: runs as dots with their intervals, published rows as rings."""
    names = list(results.runs[0].benchmarks)
    measures = [run.benchmarks[name].result.average for run in results.runs for name in names if name in run.benchmarks]
    if not measures:
        return '<p class="nodata">no question is whole yet</p>'
    published = [row for row in results.published if row.model.startswith(_PLOTTED)]
    values = [value for one in measures for value in (one.low, one.mean, one.high)]
    values += [row.accuracy[name] / 100 for row in published for name in names if name in row.accuracy]
    axis = value_axis(values, from_zero=False)
    lines = "".join(_plot_line(results, published, name, axis) for name in names)
    labels = zip(axis.ticks, tick_labels(axis, "fraction"), strict=True)
    ticks = "".join(f'<span style="left:{axis.place(tick):.2%}">{html_text(label)}</span>' for tick, label in labels)
    legend = "".join(f"<li>{_mark(number)}{html_text(run.name)}</li>" for number, run in enumerate(results.runs))
    if published:
        bases = ", ".join(row.base for row in published)
        legend += f'<li><i class="ring"></i>{_PLOTTED} as published, of {html_text(bases)}</li>'
    return (
        f'<figure class="chart dots"><ul class="legend">{legend}</ul>{lines}'
        f'<div class="dotline ticks"><span></span><div class="track">{ticks}</div></div></figure>'
    )


def _plot_line(results: EvalResults, published: Sequence[PublishedRow], name: str, axis: Axis) -> str:
    place: Callable[[float], str] = lambda value: f"{axis.place(value):.2%}"  # noqa: E731
    grid = "".join(f'<span class="tick" style="left:{place(tick)}"></span>' for tick in axis.ticks)
    rings = "".join(
        f'<i class="ring" style="left:{place(row.accuracy[name] / 100)}" '
        f'title="{plain_text(f"{row.model} of {row.base}: {row.accuracy[name]:.1f} %")}"></i>'
        for row in published
        if name in row.accuracy
    )
    dots = ""
    for number, run in enumerate(results.runs):
        if name in run.benchmarks:
            one = run.benchmarks[name].result.average
            top = f"{(number + 1) / (len(results.runs) + 1):.2%}"
            style = f"--c:var(--c{number % COLORS + 1});top:{top}"
            title = plain_text(f"{run.name}: {percent(one.mean)} %, {percent(one.low)} to {percent(one.high)} %")
            if math.isfinite(one.error):
                width = f"{axis.place(one.high) - axis.place(one.low):.2%}"
                dots += f'<b class="bar" style="{style};left:{place(one.low)};width:{width}" title="{title}"></b>'
            dots += f'<i class="dot" style="{style};left:{place(one.mean)}" title="{title}"></i>'
    height = f"height:{max(28, 16 * (len(results.runs) + 1))}px"
    label = html_text(marked(results, name))
    return (
        f'<div class="dotline" style="{height}"><span>{label}</span><div class="track">{grid}{rings}{dots}</div></div>'
    )


# --- Responses --------------------------------------------------------------------------------------------------------


def _left_out(shown: Shown) -> str:
    counts = "; ".join(f"{name}: {some:,} of {every:,} questions" for name, (some, every) in shown.of.items())
    cut = f"; {shown.cut_responses:,} responses are cut after {MAX_TOKENS} tokens" if shown.cut_responses else ""
    return f"On this page are {counts}{cut}. responses/*.jsonl has all of them."


def _browser(results: EvalResults, shown: Shown) -> str:
    names = list(shown.of)
    top = _shading_top(shown)
    data = {
        "benchmarks": names,
        "runs": [run.name for run in results.runs],
        "top": top,
        "questions": list(shown.questions),
    }
    benchmarks = "".join(f'<option value="{number}">{html_text(name)}</option>' for number, name in enumerate(names))
    verdicts = [("all", "all"), ("every", "every sample right"), ("some", "some right"), ("none", "none right")]
    if len(results.runs) > 1:
        other = results.runs[1].name
        verdicts += [("better", f"better than {other}"), ("worse", f"worse than {other}")]
    options = "".join(f'<option value="{value}">{html_text(text)}</option>' for value, text in verdicts)
    stops = "".join(
        f'<li><span class="swatch" style="--d:{strength:.3f}"></span>{significant(top * strength**2, 2)}{more}</li>'
        for strength, more in ((0.0, ""), (0.25, ""), (0.5, ""), (0.75, ""), (1.0, " nats or more"))
    )
    return (
        '<div class="browser" data-browser><noscript><p class="nodata">Browsing needs JavaScript.</p></noscript>'
        f'<div class="filters"><label>Benchmark <select name="benchmark"><option value="all">all</option>{benchmarks}'
        f'</select></label><label>Samples <select name="verdict">{options}</select></label>'
        '<label>Find <input name="find" type="search" placeholder="id, problem or answer"/></label>'
        '<span class="found" role="status"></span></div>'
        f'<div class="shading"><span>Token shading: minus the log-prob of the sampled token, in the distribution that '
        f'the engine sampled from</span><ul class="scale">{stops}</ul></div>'
        '<div class="panes"><ul class="list"></ul><article class="question"></article></div>'
        f'<script type="application/json">{script_json(data)}</script></div>'
    )


def _shading_top(shown: Shown) -> float:
    """Returns minus the log-prob with full shading, in nats: the 99th percentile of those on the page."""
    values = sorted(surprises(shown.questions))
    return values[max(math.ceil(0.99 * len(values)) - 1, 0)] if values else 0.0
