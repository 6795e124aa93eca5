"""The comparison of `make chaos`: whatever differs in a disturbed run is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.reliability.chaos import kills_table
from tests.reliability.comparison import differing_numbers
from tests.reliability.kills import Kill, Round
from tests.reliability.leftovers import differing_files


def write_run(run: Path) -> Path:
    export = run / "huggingface" / "step_2"
    export.mkdir(parents=True)
    save_file({"one": torch.ones(3), "two": torch.zeros(2)}, export / "model.safetensors")
    lines = [{"step": step, "time": 0.1 * step, "loss": 0.5, "rollout/engine_restarts": 0} for step in (1, 2)]
    write_metrics(run, lines)
    (run / "rollouts").mkdir()
    (run / "rollouts" / "step_1.jsonl.zst").write_bytes(b"records")
    return run


def write_metrics(run: Path, lines: list[dict[str, float]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def one_bit_of_a_weight(run: Path) -> None:
    weights = {"one": torch.ones(3), "two": torch.tensor([0.0, 1e-45])}
    save_file(weights, run / "huggingface" / "step_2" / "model.safetensors")


def a_metric(run: Path) -> None:
    write_metrics(run, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5000001}])


def a_line_twice(run: Path) -> None:
    write_metrics(run, [{"step": step, "loss": 0.5} for step in (1, 2, 2)])


def a_record(run: Path) -> None:
    (run / "rollouts" / "step_1.jsonl.zst").write_bytes(b"recordz")


def no_record(run: Path) -> None:
    (run / "rollouts" / "step_1.jsonl.zst").unlink()


def test_only_the_machine_differs(tmp_path: Path) -> None:
    expected, run = write_run(tmp_path / "expected"), write_run(tmp_path / "run")
    other = [{"step": step, "time": 9.0, "loss": 0.5, "rollout/engine_restarts": 3} for step in (1, 2)]
    write_metrics(run, other)
    (run / "logs").mkdir()
    (run / "do_not_requeue").write_text("finished")
    assert differing_numbers(run, expected) == [] and differing_files(run, expected) == []


@pytest.mark.parametrize("spoil", [one_bit_of_a_weight, a_metric, a_line_twice, a_record, no_record])
def test_a_difference_is_found(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    expected, run = write_run(tmp_path / "expected"), write_run(tmp_path / "run")
    spoil(run)
    assert len(differing_numbers(run, expected)) == 1


def test_other_files_are_found(tmp_path: Path) -> None:
    expected, run = write_run(tmp_path / "expected"), write_run(tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".global_step_3.tmp").touch()
    shutil.rmtree(run / "rollouts")
    assert differing_files(run, expected) == [
        "+checkpoints", "+checkpoints/.global_step_3.tmp", "-rollouts", "-rollouts/step_1.jsonl.zst",
    ]  # fmt: skip


def test_the_table_counts() -> None:
    kills = [
        Kill("rank", 1, 0.0, 0, recovered_after=30.0, job_restarted=True),
        Kill("rank", 2, 0.0, 1, recovered_after=50.0, job_restarted=True),
        Kill("engine", 3, 0.0, 2, recovered_after=14.0),
    ]
    rounds = [Round(1, kills, restarts=2, seconds=120.0), Round(2, faults=["a weight differs"], seconds=60.0)]
    lines = kills_table(rounds).splitlines()
    assert "| rank | 2 | 2 | 40 | 50 |" in lines and "| engine | 1 | 0 | 14 | 14 |" in lines
    assert "| all | 3 | 2 | 30 | 50 |" in lines
    assert lines[-1].startswith("2 runs of 3 minutes together, 3 kills, 2 restarts of jobs; 1 runs equal")
