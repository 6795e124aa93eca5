"""Attempts of a job that SLURM starts again and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.setup.attempts import ENDED_ON_REQUEST, FINISHED, begin_attempt, end_attempt, has_begun, is_finished


def begin(folder: Path, monkeypatch: pytest.MonkeyPatch, *, job: str, restart: int, step: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    begin_attempt(folder, step, most_without_progress=2)


def test_a_job_that_gets_no_further_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, monkeypatch, job="7", restart=0, step=0)
    begin(tmp_path, monkeypatch, job="7", restart=1, step=0)
    begin(tmp_path, monkeypatch, job="7", restart=2, step=4)  # got further
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"job": "7", "st\n')  # cut by a power cut
    begin(tmp_path, monkeypatch, job="7", restart=3, step=4)
    with pytest.raises(ValueError, match=r"job 7 began 2 times at step 4 .*max_attempts_without_progress=2"):
        begin(tmp_path, monkeypatch, job="7", restart=4, step=4)
    begin(tmp_path, monkeypatch, job="8", restart=0, step=4)  # a person has submitted it again
    begin(tmp_path, monkeypatch, job="8", restart=1, step=4)
    with pytest.raises(ValueError, match="job 8 began 2 times"):
        begin(tmp_path, monkeypatch, job="8", restart=2, step=4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    end_attempt(tmp_path, ENDED_ON_REQUEST)
    begin(tmp_path, monkeypatch, job="8", restart=2, step=4)  # that one did not fail
    lines = [line for line in (tmp_path / "attempts.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [(json.loads(line)["job"], json.loads(line).get("start_step")) for line in lines] == [
        ("7", 0), ("7", 0), ("7", 4), ("7", 4), ("8", 4), ("8", 4), ("8", None), ("8", 4),
    ]  # fmt: skip


def test_what_a_job_has_begun_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, monkeypatch, job="7", restart=0, step=0)
    assert not has_begun(tmp_path), "this attempt is the first"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert has_begun(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not has_begun(tmp_path), "the first attempt of this job ended before it began"
    begin(tmp_path, monkeypatch, job="8", restart=1, step=0)
    assert not has_begun(tmp_path), "nor is it this one"


def test_outside_a_job_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for _ in range(4):
        begin_attempt(tmp_path, 0, most_without_progress=1)


def test_a_run_is_finished_until_something_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert not is_finished(tmp_path)
    begin_attempt(tmp_path, 0, most_without_progress=1)
    end_attempt(tmp_path, ENDED_ON_REQUEST)
    assert not is_finished(tmp_path)
    begin_attempt(tmp_path, 2, most_without_progress=1)
    end_attempt(tmp_path, FINISHED)
    assert is_finished(tmp_path)
    begin_attempt(tmp_path, 4, most_without_progress=1)
    assert not is_finished(tmp_path)
