"""The page of `vppo fp8-fidelity`: a table, and histograms of what FP8 changes, recipe by recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vppo.observability.report.charts import frame_html
from megatron_vppo.observability.report.document import document_html
from megatron_vppo.observability.report.scales import Axis, log_axis, show, significant, value_axis
from megatron_vppo.observability.report.text import html_text, plain_text
from megatron_vppo.system.whole import whole_file

Report = Mapping[str, Any]
"""The contents of fidelity.json, from measure.py."""


@dataclass(frozen=True, slots=True)
class Bars:
    """One outline of a histogram."""

    label: str
    counts: Sequence[int]
    color: int
    """The number of the color in page.css."""


def write_fidelity_page(report: Report, path: Path) -> None:
    """Writes the page, which refers to no other file, whole or not at all."""
    with whole_file(path) as file:
        file.write(render_fidelity(report).encode("utf-8"))


def render_fidelity(report: Report) -> str:
    """Writes the page as one HTML document."""
    title = f"{precision(report)} against {report['baseline_dtype']}"
    return document_html(
        title,
        f'<header class="page"><p class="eyebrow">{html_text(str(report["model"]))}</p><h1>{html_text(title)}</h1>'
        f'<p class="result">{html_text(subject(report))}</p>{_tiles(report)}</header>'
        f"<main>{''.join(_sections(report))}</main>",
    )


def precision(report: Report) -> str:
    """Returns the name of the precision, for headings."""
    return "Emulated FP8" if report["emulated"] else "FP8"


def subject(report: Report) -> str:
    """Returns the responses that were measured, in a sentence."""
    ends = report["bf16_layers_at_ends"]
    return (
        f"{report['responses']} responses ({report['tokens']} tokens) to {report['prompts']} prompts of "
        f"'{report['split']}', each scored with its image and with the perturbed image; dependency "
        f"{report['dependency']}, {report['top_p_perception_tokens']:.0%} of the tokens kept"
        + (f"; {ends} layers at either end are not in FP8." if ends else ".")
    )


def _tiles(report: Report) -> str:
    tiles = []
    for label, found in compared(report).items():
        notes = (
            f"of the kept tokens are kept in both; dependency lost {_number(found['lost_dependency'], digits=2)}. "
            f"Rank correlation {_number(found['spearman'])}, mean log-prob difference "
            f"{significant(found['logp']['mean'], 2)} nats"
        )
        tiles.append(
            f'<div class="tile"><dt>{html_text(label)}</dt><dd>{show(found["overlap"], "fraction")}'
            f"<small>{html_text(notes)}</small></dd></div>"
        )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def compared(report: Report) -> dict[str, Any]:
    """Returns the figures of everything that is compared with the baseline: the recipes, then the controls."""
    return {**report["recipes"], **{f"{name} alone": found for name, found in report["controls"].items()}}


def _sections(report: Report) -> Sequence[str]:
    figures = compared(report)

    def section(anchor: str, title: str, lead: str, bars: Mapping[str, tuple[str, int]], edges: str, *, x: Axis) -> str:
        """`bars`: label and colour of each histogram, by its name in the report."""
        counts = {label: found["histograms"] for label, found in figures.items()}
        y = value_axis([0, *(max(histograms[name]) for histograms in counts.values() for name in bars)], from_zero=True)
        charts = [
            histogram_html(
                label, [Bars(text, histograms[name], color) for name, (text, color) in bars.items()],
                histograms[edges], x=x, y=y,
            )
            for label, histograms in counts.items()
        ]  # fmt: skip
        return (
            f'<section id="{anchor}"><header class="sectionhead"><h2>{html_text(title)}</h2>'
            f"<p>{html_text(lead)}</p></header>"
            f'<div class="grid pairs">{"".join(charts)}</div></section>'
        )

    histograms = next(iter(figures.values()))["histograms"]
    nats, small_nats = log_axis(histograms["logp_edges"]), log_axis(histograms["dependency_edges"])
    return (
        section(
            "logps", "Log-prob differences",
            "Tokens by absolute difference, nats. The first bin also holds smaller differences, and none at all.",
            {"logp": ("original image", 1), "masked_logp": ("perturbed image", 2)}, "logp_edges", x=nats,
        ),
        section(
            "dependency", "Shift of the visual dependency",
            f"Tokens by absolute shift, nats. The median dependency is {significant(report['dependency_median'], 2)}.",
            {"dependency_up": ("more dependent", 3), "dependency_down": ("less dependent, or equal", 4)},
            "dependency_edges", x=small_nats,
        ),
        section(
            "kept", "Kept tokens in both",
            "Responses by the share of their kept tokens that are kept in both. Tokens kept at random would have a "
            f"share of {report['top_p_perception_tokens']:.0%}.",
            {"overlap": ("responses", 5)}, "overlap_edges", x=value_axis([0.0, 1.0], from_zero=True),
        ),
    )  # fmt: skip


def histogram_html(title: str, bars: Sequence[Bars], edges: Sequence[float], *, x: Axis, y: Axis) -> str:
    """Draws a figure with the outlines of several histograms over the same bins.

    Args:
        edges: the edges of the bins, one more than bins.
    """
    paths = "".join(
        f'<path class="line" style="--c:var(--c{bar.color})" d="{_outline(bar.counts, edges, x, y)}"/>' for bar in bars
    )
    legend = "".join(
        f'<li><i style="--c:var(--c{bar.color})"></i>{html_text(bar.label)} <b>{sum(bar.counts):,}</b></li>'
        for bar in bars
    )
    summary = f"{title}: " + ", ".join(f"{bar.label} {sum(bar.counts)}" for bar in bars)
    return (
        f'<figure class="chart" aria-label="{plain_text(summary)}"><figcaption><h3>{html_text(title)}</h3>'
        f'</figcaption><ul class="legend">{legend}</ul>'
        f"{frame_html(paths, x, y, unit='', x_title='nats' if x.log else 'share', x_unit='' if x.log else 'fraction')}"
        "</figure>"
    )


def _outline(counts: Sequence[int], edges: Sequence[float], x: Axis, y: Axis) -> str:
    places = [round(x.place(edge) * 1000, 1) for edge in edges]
    heights = [round(1000 - y.place(count) * 1000, 1) for count in counts]
    steps = "".join(f"V{height}H{right}" for height, right in zip(heights, places[1:], strict=True))
    return f"M{places[0]} 1000{steps}V1000"


def _number(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None else significant(value, digits)
