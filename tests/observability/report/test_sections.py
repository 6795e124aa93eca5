"""The charts draw what a run logs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_vppo.observability.report.data import load_run
from megatron_vppo.observability.report.sections import sections

ROOT = Path(__file__).parents[3]


def test_every_line_is_of_a_documented_metric(tmp_path: Path) -> None:
    """docs/metrics.md lists what a run logs (test_training.py shows that); here each of its first names has a value."""
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    names: dict[str, float] = {}
    for row in rows:
        first, *endings = re.findall(r"`([^`]+)`", row.split("|")[1])
        names[first] = 1.0
        for ending in endings:
            names[first.rpartition(ending[0])[0] + ending] = 1.0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **names}) + "\n")
    lines = [
        (chart.title, line.label, line.series.values)
        for section in sections(load_run(tmp_path))
        for chart in section.charts
        for line in chart.lines
    ]
    assert [line for line in lines if not line[2]] == []
    assert len(lines) > 25


def test_the_parts_of_the_loss_add_up(tmp_path: Path) -> None:
    step = {
        "step": 1,
        "actor/pg_loss": 0.25,
        "actor/entropy_penalty": 0.5,
        "actor/entropy_loss": 9.0,
        "actor/perception_loss": -0.125,
        "actor/kl_prcp_loss": -9.0,
        "actor/perturbed_entropy_penalty": 0.0625,
        "actor/loss": 0.6875,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (loss,) = [chart for section in sections(load_run(tmp_path)) for chart in section.charts if chart.title == "Loss"]
    assert [line.series.values for line in loss.lines] == [(0.25,), (0.5,), (-0.125,), (0.0625,), (0.6875,)]
