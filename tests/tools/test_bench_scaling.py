"""scaling.py on a tiny step: every part is measured, and a step is added up from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import scaling, scaling_cost


@pytest.mark.distributed
def test_every_part_is_measured_and_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.json"
    sizes = ["--responses", "16", "--tokens", "5", "--worlds", "1", "2", "--reward-workers", "1", "--rows", "20"]
    scaling.main([*sizes, "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["sizes"] == {"responses": 16, "tokens": 5, "rounds": 2, "rows": 20} and "torch" in report["versions"]
    assert set(report["collectives"]) == {"1", "2"}
    measured = [part for world in report["collectives"].values() for part in world.values()]
    assert len(measured) == 4 and all(part["wall_s"] >= 0 for part in (*report["parts"].values(), *measured))
    first, later = report["start"].values()
    assert first["rows_per_s"] == pytest.approx(20 / first["wall_s"], rel=0.1)
    assert later["rows_per_s"] == pytest.approx(20 / later["wall_s"], rel=0.1)
    graded, handed = report["parts"]["rewards, mathruler, 1 workers"], report["parts"]["records, handed over"]
    for costs in report["per_step"].values():
        for workers, name in ((1, "1 worker"), (32, "32 workers")):
            seconds = 2 * (graded["own_cpu_s"] + graded["workers_cpu_s"] / workers)
            assert costs[f"texts and rewards, {name}"] == pytest.approx(seconds, abs=0.002)
            own = handed["cpu_s"] + costs[f"texts and rewards, {name}"]
            every_rank = sum(costs[part] for part in (*scaling_cost.COLLECTIVES.values(), "mismatch, assemble"))
            assert costs[f"rank 0 and every rank, {name}"] == pytest.approx(own + every_rank, abs=0.005)
        assert costs["rank 0 alone, 32 workers"] == pytest.approx(own, abs=0.003)
    printed = capsys.readouterr().out
    for name in (*report["parts"], *report["start"], "responses, gathered, 2 ranks", "32b, GPUs, modelled"):
        assert name in printed


def test_collectives_go_along_a_line_that_does_not_fall() -> None:
    assert scaling_cost._along_a_line({2: 1.0, 4: 2.0}, 10) == pytest.approx(5.0)
    assert scaling_cost._along_a_line({2: 2.0, 4: 1.0}, 10) == pytest.approx(1.5)


def test_modelled_seconds_are_those_of_the_whole_step() -> None:
    """The model's 259 s on 8 GPUs and 379 s on 32 hold 17 s of host work."""
    assert scaling_cost.MODELS["7b"].seconds(8) + 17 == pytest.approx(259)
    assert scaling_cost.MODELS["32b"].seconds(32) + 17 == pytest.approx(379)
