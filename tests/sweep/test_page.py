"""The page of a sweep, read back as a browser would: table, curves with bands, links to the runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_vppo.sweep.page import render_sweep
from megatron_vppo.sweep.plan import Sweep
from megatron_vppo.sweep.results import gather_results
from megatron_vppo.sweep.status import status_of
from tests.sweep.folders import SWEEP, make_sweep, write_run


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def render(sweep: Sweep) -> str:
    states = {run.name: status_of(run) for run in sweep.runs}
    return render_sweep(sweep, states, gather_results(sweep, states))


class Page(HTMLParser):
    """Cells by row, links, and the paths of bands; tags that are not closed in order are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.bands: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in ("meta", "path"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "path" and given.get("class") == "band":
            self.bands.append(given["d"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_results_curves_and_runs(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    ends = ([1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0])
    for run, end in zip(sweep.runs[:3], ends, strict=False):
        write_run(run, {0: [0.0, 0.0], 10: end})
    (sweep.runs[0].folder / "report.html").touch()
    html = render(sweep)
    page = Page(html)
    assert [row[:5] for row in page.rows[1:3]] == [
        ["vppo", "2 of 2", "10", "0.0 ± 0.0", "75.0 ± 25.0"], ["dapo (baseline)", "1 of 2", "10", "0.0", "50.0"],
    ]  # fmt: skip
    assert page.rows[4:] == [["vppo-seed1", "finished", "10"], ["dapo-seed1", "finished", "10"],
                             ["vppo-seed2", "finished", "10"], ["dapo-seed2", "not begun", "–"]]  # fmt: skip
    assert page.links == ["vppo-seed1/report.html"]
    assert "2 variants, 2 seeds; 3 of 4 runs are finished." in html
    # vppo's accuracy: 0 ± 0 at step 0, 75 ± 25 % at step 10, on axes from -0.5 to 10.5 and from 0 to 100 %.
    band = next(band for band in page.bands if "500.0" in band)
    assert band == "M45.5 1000.0 954.5 500.0 954.5 0.0 45.5 1000.0Z"
    hover = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html)]
    assert hover[0]["series"][0] == {"label": "vppo", "color": 1, "values": [0, 0.75]}


def test_a_ninth_variant_is_dashed_in_the_colour_of_the_first(tmp_path: Path) -> None:
    others = "".join(f"  rate{number}: [actor.optim.lr=1.0e-{number}]\n" for number in (2, 3, 4, 5, 7, 8, 9))
    sweep = make_sweep(tmp_path, SWEEP.replace("baseline", others + "baseline"))
    for run in sweep.runs:
        write_run(run, {0: [0.0, 0.0], 10: [1.0, 1.0]})
    html = render(sweep)
    accuracy = html.partition("Held-out accuracy")[2].partition("</figure>")[0]
    drawn = re.findall(r'class="(line(?: dashed)?)" style="--c:var\(--c(\d)\)"', accuracy)
    assert sorted(drawn) == [*(("line", str(color)) for color in range(1, 9)), ("line dashed", "1")]
    assert accuracy.count('<i class="hollow" style="--c:var(--c1)">') == 1


def test_nothing_yet(tmp_path: Path) -> None:
    page = render(make_sweep(tmp_path))
    assert "no step has ended yet" in page and Page(page).bands == []
