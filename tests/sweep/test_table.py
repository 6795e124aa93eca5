"""The table, its notes and the JSON, from results made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from megatron_vppo.observability.statistics import Estimate, PairedTest
from megatron_vppo.sweep.results import METRICS, MeanCurve, PairedDifference, SweepResults, VariantResults
from megatron_vppo.sweep.table import as_json, markdown

NONE = MeanCurve((), ())
BASE = VariantResults(
    name="dapo", seeds=(1, 2), finished=(1, 2), difference=None, why_not=None,
    curves={**dict.fromkeys(METRICS, NONE),
            "val/accuracy": MeanCurve((0, 10), (Estimate(0.25, 0.0), Estimate(0.6044, 0.0126)))},
)  # fmt: skip
BETTER = replace(
    BASE, name="vppo", difference=PairedDifference(10, (1, 2), PairedTest(512, 0.0211, -0.0049, 0.0468, 0.0004))
)
NEW = VariantResults("grpo", (), (), dict.fromkeys(METRICS, NONE), None, "no seed has begun in both")


def results(*variants: VariantResults) -> SweepResults:
    return SweepResults("study", Path("runs/study"), "dapo", 3, variants)


def test_a_row_per_variant() -> None:
    assert markdown(results(BETTER, BASE, NEW, replace(NEW, name="other"))) == (
        "| variant | seeds | steps | start, % | end, % | questions | difference, points | 95% interval | p |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| vppo | 2 of 3 | 10 | 25.0 ± 0.0 | 60.4 ± 1.3 | 512 | +2.1 | −0.5 .. +4.7 | < 0.001 |\n"
        "| dapo (baseline) | 2 of 3 | 10 | 25.0 ± 0.0 | 60.4 ± 1.3 | – | – | – | – |\n"
        "| grpo | 0 of 3 | – | – | – | – | – | – | – |\n"
        "| other | 0 of 3 | – | – | – | – | – | – | – |\n"
        "\ngrpo, other: not compared with dapo: no seed has begun in both\n"
    )


def test_what_is_not_finished_shows() -> None:
    curve = MeanCurve((2, 20), (Estimate(0.25, None), Estimate(0.5, None)))
    begun = replace(BETTER, finished=(), seeds=(1,), curves={**BETTER.curves, "val/accuracy": curve})
    *_, row, _, note = markdown(results(begun)).splitlines()
    assert row == "| vppo | 0 of 3 (1 begun) | 20 | – | 50.0 | 512 | +2.1 | −0.5 .. +4.7 | < 0.001 |", (
        "no validation at step 0"
    )
    assert note == "vppo: compared with dapo at step 10"


def test_json_has_every_number() -> None:
    found = json.loads(json.dumps(as_json(results(BETTER, BASE))))
    assert found["folder"] == "runs/study" and found["baseline"] == "dapo"
    assert found["variants"][0]["difference"]["test"] == {
        "questions": 512, "difference": 0.0211, "low": -0.0049, "high": 0.0468, "p_value": 0.0004,
    }  # fmt: skip
    assert found["variants"][0]["curves"]["val/accuracy"]["estimates"][1] == {"mean": 0.6044, "error": 0.0126}
