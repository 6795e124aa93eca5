"""scaling.py on a tiny step: every part is measured, and a step is added up from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import scaling


@pytest.mark.distributed
def test_every_part_is_measured_and_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.json"
    sizes = ["--responses", "16", "--tokens", "5", "--worlds", "1", "2", "--reward-workers", "1"]
    scaling.main([*sizes, "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["sizes"] == {"responses": 16, "tokens": 5, "rounds": 2} and "torch" in report["versions"]
    assert set(report["gather"]) == {"1", "2"}
    assert all(part["wall_s"] >= 0 for part in [*report["parts"].values(), *report["gather"].values()])
    graded, handed = report["parts"]["rewards, mathruler, 1 workers"], report["parts"]["records, handed over"]
    for costs in report["per_step"].values():
        assert costs["rewards, 1 worker"] == pytest.approx(
            2 * (graded["own_cpu_s"] + graded["workers_cpu_s"]), abs=0.01
        )
        shared = costs["gather"] + costs["decode"] + costs["mismatch, assemble"] + handed["cpu_s"]
        for workers in ("1 worker", "32 workers"):
            assert costs[f"sum, {workers}"] == pytest.approx(shared + costs[f"rewards, {workers}"], abs=0.03)
    printed = capsys.readouterr().out
    for name in (*report["parts"], "gather of responses, 2 ranks", "32b, GPUs, modelled"):
        assert name in printed


def test_modelled_seconds_are_those_of_the_whole_step() -> None:
    """The model's 259 s on 8 GPUs and 379 s on 32 hold 17 s of host work."""
    assert scaling.MODELS["7b"].seconds(8) + 17 == pytest.approx(259)
    assert scaling.MODELS["32b"].seconds(32) + 17 == pytest.approx(379)
