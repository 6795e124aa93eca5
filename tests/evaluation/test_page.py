"""The page of an evaluation: its tables, and its browser in a real one, where there is Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.evaluation.browser import Shown, pick_shown
from megatron_vppo.evaluation.page import render_evaluation
from megatron_vppo.evaluation.published import MAIN
from megatron_vppo.evaluation.results import EvalResults, read_run
from tests.evaluation.test_results import START, TRAINED, Study, make
from tests.observability.report.test_page import HOSTILE, Elements

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalResults, Shown]:
    folder: Path = tmp_path_factory.mktemp("page")
    make(folder, "start", "trained")
    study = Study(folder, leaked="two")
    study.write("start", START)
    study.write("trained", TRAINED, tokens=[HOSTILE, "a\nb", ""], vote=HOSTILE, error=HOSTILE)
    runs = [read_run(folder / name, study.inputs.benchmarks) for name in ("trained", "start")]
    shown = pick_shown(study.inputs.benchmarks, study.inputs.images, runs)
    return study.results("trained", "start"), shown


@pytest.fixture(scope="module")
def html(evaluated: tuple[EvalResults, Shown]) -> str:
    return render_evaluation(*evaluated)


def test_tables_and_plot_have_the_figures(html: str) -> None:
    page = Elements(html)
    cells = [text for _, text in page.all("td")]
    for expected in ("91.7", "50.0", "100.0 .. 100.0", "+50.0"):
        assert expected in cells
    titles = [attributes["title"] for attributes, _ in page.all("i", "dot")]
    assert titles[0] == "trained: 100.0 %, 100.0 to 100.0 %" and len(titles) == 4
    assert [text for _, text in page.all("h2")] == ["Overview", "Figures", "Comparisons", "Responses"]


def test_published_rows_are_on_table_and_plot(evaluated: tuple[EvalResults, Shown]) -> None:
    results, shown = evaluated
    run = results.runs[0]
    renamed = replace(run, benchmarks={"MMK12": run.benchmarks["one"]})
    page = Elements(render_evaluation(replace(results, runs=[renamed], comparisons=[], published=MAIN), shown))
    rings = [attributes.get("title") for attributes, _ in page.all("i", "ring")]
    assert "VPPO of Qwen2.5-VL-7B: 82.8 %" in rings
    assert "DAPO (Qwen2.5-VL-7B)" in [text for _, text in page.all("td")]


def test_the_page_refers_to_nothing_outside(html: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import""", html)


def test_text_of_models_is_data_and_no_element(html: str) -> None:
    """Nothing of it ends the script element that it is in."""
    page = Elements(html)
    (data,) = [json.loads(text) for attributes, text in page.all("script") if attributes.get("type")]
    assert data["questions"][0]["runs"][0][0]["tokens"][0] == HOSTILE
    assert len(page.all("script")) == 2 and page.all("img") == []


PROBE = """
<script>
addEventListener("load", async () => {
  const seen = {};
  const list = () => [...document.querySelectorAll(".list .id")].map((one) => one.textContent);
  const set = (name, value) => {
    const field = document.querySelector(`[name=${name}]`);
    field.value = value;
    field.dispatchEvent(new Event(name === "find" ? "input" : "change"));
    return list();
  };
  seen.all = list();
  seen.found = document.querySelector(".found").textContent;
  seen.one = set("benchmark", "0");
  seen.every = set("verdict", "every");
  seen.worse = set("verdict", "worse");
  seen.empty = document.querySelector(".question").textContent;
  set("benchmark", "all");
  seen.some = set("verdict", "some");
  seen.text = document.querySelector(".question").textContent;
  const image = document.querySelector(".question img");
  await image.decode();
  seen.image = image.naturalWidth;
  seen.shades = [...document.querySelectorAll(".response:last-child .tokens span")]
    .map((one) => one.style.getPropertyValue("--d"));
  set("verdict", "all");
  seen.byId = set("find", "Which? 2");
  document.querySelectorAll(".list button")[1].click();
  seen.chosen = document.querySelector(".question h3").textContent;
  seen.injected = document.querySelectorAll(".question script, .question img[onerror]").length;
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_browser_filters_and_shows(html: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html.replace("</body>", f"{PROBE}</body>"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'page.html'}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, "the page's script failed"
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert len(seen["all"]) == 6 and seen["found"] == "6 of 6"
    assert sorted(seen["one"]) == ["one · 0", "one · 1", "one · 2"] == sorted(seen["every"])
    assert seen["worse"] == [] and "no question of this kind" in seen["empty"]
    assert seen["some"] == ["two · 2"]
    for expected in ("Which? 2", "Ground truth2", "trained1 of 2 right", "start1 of 2 right", "✓ right", HOSTILE):
        assert expected in seen["text"]
    assert seen["image"] == 84
    assert seen["shades"] == ["0.632", "1.000", "0.000"], "sqrt(0.5 / 1.25), and the 99th percentile is 1.25 nats"
    assert seen["byId"] == sorted(seen["byId"]) == ["one · 2", "two · 2"] and seen["chosen"] == "two · 2"
    assert seen["injected"] == 0
