"""The page of `vppo fp8-fidelity`, from figures made up here."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from megatron_vppo.fidelity.page import Bars, histogram_html, render_fidelity
from megatron_vppo.observability.report.scales import Axis

EDGES = [1e-2, 1e-1, 1.0]


def figures(**changes: Any) -> dict[str, Any]:
    return {
        "logp": {"mean": 0.0123},
        "spearman": 0.987,
        "overlap": 0.876,
        "lost_dependency": 4.3e-9,
        "histograms": {
            "logp_edges": EDGES, "dependency_edges": EDGES, "overlap_edges": [0.0, 0.5, 1.0],
            "logp": [3, 1], "masked_logp": [4, 0], "dependency_up": [1, 1], "dependency_down": [2, 0],
            "overlap": [0, 7],
        },
        **changes,
    }  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    return {
        "emulated": True, "model": "<b>model</b>", "baseline_dtype": "float32", "bf16_layers_at_ends": 0,
        "split": "val", "prompts": 2, "responses": 7, "tokens": 4, "dependency": "k3_sampled",
        "dependency_median": 1.5e-9, "top_p_perception_tokens": 0.4,
        "recipes": {"blockwise": figures()}, "controls": {"bfloat16": figures()}, **changes,
    }  # fmt: skip


def test_page_says_what_is_emulated() -> None:
    page = render_fidelity(report())
    assert page.count("Emulated FP8 against float32") == 2, "title and heading"
    assert "blockwise" in page and "bfloat16 alone" in page and "87.6%" in page and "4.3e-9" in page
    real = render_fidelity(report(emulated=False, baseline_dtype="bfloat16"))
    assert "<title>FP8 against bfloat16</title>" in real and "mulated" not in real


def test_page_stands_alone_and_escapes() -> None:
    page = render_fidelity(report())
    assert "&lt;b&gt;model&lt;/b&gt;" in page and "<b>model" not in page
    assert not re.search(r"https?:|src=|<link|<script", page)
    assert page.count('<figure class="chart"') == 6, "three of each"


def test_characters_that_act_unseen_are_shown() -> None:
    page = render_fidelity(report(model="m\x1b[31m\u202egnp", split="val\x00"))
    assert "m␛[31m<U+202E>gnp" in unescape(re.sub(r"<[^>]+>", "", page)) and "&#x27;val<code" in page
    assert not re.search("[\x00\x1b\u202e]", page)


def test_undefined_figures_are_named() -> None:
    nothing = figures(spearman=None, lost_dependency=None)
    assert "Rank correlation undefined" in render_fidelity(report(recipes={"mxfp8": nothing}))


@pytest.mark.parametrize(
    ("axis", "edges", "path"),
    [
        # bins [0, 1) and [1, 4) of a range of 4, counts 5 and 10 of 10: half the height, then all of it
        (Axis(0.0, 4.0, (0.0, 4.0)), [0.0, 1.0, 4.0], "M0.0 1000V500.0H250.0V0.0H1000.0V1000"),
        (Axis(1e-2, 1.0, (1e-2, 1.0), log=True), EDGES, "M0.0 1000V500.0H500.0V0.0H1000.0V1000"),
    ],
    ids=["linear", "logarithmic"],
)
def test_outline_follows_the_counts(axis: Axis, edges: list[float], path: str) -> None:
    html = histogram_html("t", [Bars("all", [5, 10], 1)], edges, x=axis, y=Axis(0.0, 10.0, (0.0, 10.0)))
    assert f'd="{path}"' in html
    assert "<b>15</b>" in html
