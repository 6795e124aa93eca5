"""Curves and table of examples/digits_cpu/compare.sh, from runs written by hand."""

import json
from pathlib import Path

import compare_plot
import pytest


def write_run(folder: Path, accuracies: dict[int, float | None]) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": step, **({} if a is None else {"val/accuracy": a})} for step, a in accuracies.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_keep_the_steps_that_all_seeds_share(tmp_path):
    write_run(tmp_path / "dapo-seed1", {0: 0.25, 1: None, 5: 0.5, 10: 0.75})
    write_run(tmp_path / "dapo-seed2", {0: 0.75, 1: None, 5: 1.0})
    write_run(tmp_path / "config-seed1", {0: 0.5, 5: 0.25})
    write_run(tmp_path / "something-else", {0: 0.5})
    curves = compare_plot.read_curves(tmp_path)
    assert list(curves) == ["config", "dapo"]
    assert curves["dapo"].seeds == (1, 2)
    assert curves["dapo"].steps == (0, 5)
    assert curves["dapo"].accuracies == ((0.25, 0.75), (0.5, 1.0))
    lines = compare_plot.table(curves).splitlines()
    assert lines[2] == ("| VPPO | 1 | 5 | 0.500 (0.500 .. 0.500) | 0.250 (0.250 .. 0.250) | 0.375 (0.375 .. 0.375) |")
    assert lines[3] == ("| DAPO | 2 | 5 | 0.500 (0.250 .. 0.750) | 0.750 (0.500 .. 1.000) | 0.625 (0.375 .. 0.875) |")


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run with validations"):
        compare_plot.read_curves(tmp_path)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "grpo-seed1", {0: 0.25, 5: 0.5})
    compare_plot.draw(compare_plot.read_curves(tmp_path), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
