"""The results as Markdown and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vppo.evaluation.published import MAIN
from megatron_vppo.evaluation.results import EvalResults
from megatron_vppo.evaluation.table import as_json, markdown, points, short_markdown
from megatron_vppo.observability.json_lines import dump_line
from tests.evaluation.test_results import START, TRAINED, Study, make


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> EvalResults:
    folder: Path = tmp_path_factory.mktemp("table")
    make(folder, "start", "trained")
    study = Study(folder, leaked="two")
    study.write("start", START)
    study.write("trained", TRAINED)
    return study.results("trained", "start")


def lines_of(text: str, beginning: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {beginning}")
    ]


def test_the_tables_have_the_figures(results: EvalResults) -> None:
    text = short_markdown(results)
    one, again, difference = lines_of(text, "one ")
    assert one[:7] == ["one", "3", "100.0", "100.0 .. 100.0", "100.0", "100.0", "0.0"]
    assert again[2] == "50.0"
    assert difference[:3] == ["one", "3", "+50.0"]
    assert lines_of(text, "mean ")[0][:3] == ["mean", "6", "91.7"]
    assert lines_of(text, "mean without")[0][2] == "100.0"
    assert lines_of(text, "two \\*") or lines_of(text, "two *")
    assert "* models were chosen by these questions" in text
    assert "2 samples per question, temperature 1, top-p 1, top-k off, at most 8 tokens" in text


def test_published_rows_stand_below_the_runs(results: EvalResults) -> None:
    """Benchmarks are matched by their names: the first one is called MMK12 here."""
    run = results.runs[0]
    renamed = replace(run, benchmarks={"MMK12": run.benchmarks["one"]})
    text = markdown(replace(results, runs=[renamed], comparisons=[], published=MAIN))
    assert ["VPPO (Qwen2.5-VL-7B)", "82.8", "–", "arXiv 2510.09285 v2, table 1"] in lines_of(text, "VPPO")
    assert lines_of(text, "trained ")[0][:2] == ["trained", "100.0"]
    assert "avg@8 at temperature 1.0" in text
    assert results.published == [], "no published row has benchmarks of these names"


def test_json_has_all_numbers(results: EvalResults) -> None:
    read = json.loads(dump_line(as_json(results)))
    trained, start = read["runs"]
    assert start["benchmarks"]["one"]["result"]["average"]["mean"] == pytest.approx(0.5)
    assert trained["settings"]["rollout"]["n"] == 2 and "benchmarks" not in trained["settings"]
    assert read["comparisons"][0]["tests"]["one"]["difference"] == pytest.approx(0.5)
    assert read["selection_leak"] == ["two"]


def test_questions_that_are_not_compared_are_told(results: EvalResults) -> None:
    (comparison,) = results.comparisons
    assert "are compared" not in short_markdown(results)
    other = replace(comparison, tests={}, overall=None, unlike={"one": (0, 3), "two": (1, 3)})
    text = short_markdown(replace(results, comparisons=[other]))
    assert "one: 0 of 3 questions are compared; the other evaluation has not recorded the rest" in text
    assert "two: 1 of 3 questions are compared" in text


def test_recorded_benchmarks_outside_the_suite_are_told(results: EvalResults) -> None:
    assert "recorded as well" not in short_markdown(results)
    other = replace(results, elsewhere=["three", "four"])
    assert "Responses to three, four are recorded as well; this suite does not name them" in short_markdown(other)
    assert as_json(other)["recorded_outside_suite"] == ["three", "four"]


def test_points() -> None:
    assert [points(share) for share in (0.0123, -0.5, 0.0)] == ["+1.2", "−50.0", "+0.0"]
