"""Published rows: complete, with averages that follow from them, under the names of the suite that repeats them."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import yaml

from megatron_vppo.evaluation.published import ABLATIONS, INDEPENDENT, MAIN, VPPO8, PublishedRow
from megatron_vppo.evaluation.released import unlike_release
from megatron_vppo.evaluation.suite import Benchmark

SUITE = Path(__file__).resolve().parents[2] / "examples/eval/vppo8.yaml"
ROUNDING = 0.05 + 0.05
"""Numbers have one decimal: so much the mean of eight may be off, and so much the average itself."""


@pytest.mark.parametrize("row", [*MAIN, *ABLATIONS], ids=lambda row: f"{row.base} {row.model}")
def test_averages_follow_from_the_eight(row: PublishedRow) -> None:
    assert tuple(row.accuracy) == VPPO8
    assert row.average == pytest.approx(statistics.fmean(row.accuracy.values()), abs=ROUNDING)


def test_the_paper_s_main_claim_is_there() -> None:
    """+2.5 over DAPO at 7B and +1.1 at 32B."""
    averages = {(row.base, row.model): row.average for row in MAIN}
    for base, gain in (("Qwen2.5-VL-7B", 2.5), ("Qwen2.5-VL-32B", 1.1)):
        assert averages[base, "VPPO"] - averages[base, "DAPO"] == pytest.approx(gain, abs=1e-9)  # type: ignore[operator]
    assert averages["Qwen3-VL-8B", "VPPO-8B"] == 71.4


def test_rows_are_told_apart_and_have_their_source() -> None:
    rows = [*MAIN, *ABLATIONS, *INDEPENDENT]
    assert len({(row.base, row.model, row.source, row.note) for row in rows}) == len(rows)
    assert all(row.source for row in rows)
    assert all(row.note for row in INDEPENDENT), "what their averages are over"


def test_the_suite_has_the_paper_s_benchmarks_in_its_order() -> None:
    benchmarks = [Benchmark(**settings) for settings in yaml.safe_load(SUITE.read_text())["benchmarks"]]
    assert tuple(benchmark.name for benchmark in benchmarks) == VPPO8
    assert [benchmark.name for benchmark in benchmarks if benchmark.selection_leak] == ["MMK12"]
    unknown = [b.name for b in benchmarks if unlike_release(b.source, b.path, 1) is None]
    assert unknown == [], "the number of rows of each is known"
