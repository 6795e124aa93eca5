"""`vppo summary`: the outcome of a run as one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.cli.main import main
from megatron_vppo.observability.summary import summarize

LINES = [
    {"step": 0, "timing_s/step": 2.0, "val/accuracy": 0.25},
    {"step": 1, "timing_s/step": 3.5, "training/rollout_logp_diff_max": 1e-5, "weight_sync/checksums_ok": 1.0},
    {"step": 2, "timing_s/step": 4.0, "val/accuracy": 0.5, "training/rollout_logp_diff_max": 3e-5},
]
OUTCOME = {
    "val_accuracy_start": 0.25,
    "val_accuracy_end": 0.5,
    "steps": 2,
    "seconds_rl": 9.5,
    "max_rollout_logprob_diff": 3e-5,
    "weight_checksums_ok": True,
    "report": None,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_the_numbers(run_dir: Path) -> None:
    assert summarize(run_dir) == OUTCOME
    (run_dir / "report.html").touch()
    assert summarize(run_dir)["report"] == str(run_dir / "report.html")


def test_a_run_without_checks_and_one_with_a_failed_check(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(json.dumps({"step": 3, "timing_s/step": 1.0}) + "\n")
    found = summarize(run_dir)
    assert (found["val_accuracy_end"], found["max_rollout_logprob_diff"], found["weight_checksums_ok"]) == (None,) * 3
    path.write_text(json.dumps({"step": 3, "timing_s/step": 1.0, "weight_sync/checksums_ok": 0.0}) + "\n")
    assert summarize(run_dir)["weight_checksums_ok"] is False


def test_the_command(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of JSON, in the order of the fields above."""
    assert main(["summary", str(run_dir)]) == 0
    assert capsys.readouterr().out == json.dumps(OUTCOME) + "\n"
    assert main(["summary", str(run_dir), "--seconds-rl", "12"]) == 0
    assert capsys.readouterr().out == json.dumps({**OUTCOME, "seconds_rl": 12.0}) + "\n"


def test_numbers_that_are_none_stay_valid_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "timing_s/step": "Infinity", "val/accuracy": NaN}\n')
        file.write('{"step": 4, "training/rollout_logp_diff_max": "NaN"}\n')
    assert main(["summary", str(run_dir)]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["val_accuracy_end"], found["seconds_rl"], found["steps"]) == ("NaN", "Infinity", 4)
    assert found["max_rollout_logprob_diff"] == "NaN"  # max() alone would forget it


def test_seconds_of_the_lines_that_have_them(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "timing_s/step": null, "val/accuracy": 0.75}\n')
    found = summarize(run_dir)
    assert (found["seconds_rl"], found["val_accuracy_end"], found["steps"]) == (9.5, 0.75, 3)


def test_a_folder_without_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(tmp_path)]) == 2
    assert f"{tmp_path} has no metrics.jsonl" in capsys.readouterr().err
