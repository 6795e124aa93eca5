"""The end of a job's time. What a real SLURM says is asked in tests/slurm."""

from __future__ import annotations

import time

import pytest

from megatron_vppo.system.time_limit import job_end_time, seconds_left


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10:00\n", 600), ("0:05", 5), ("1:02:03", 3723), ("2-01:02:03", 176523), ("UNLIMITED", None), ("INVALID", None)],
)
def test_the_forms_that_squeue_prints(text: str, seconds: float | None) -> None:
    assert seconds_left(text) == seconds


def test_the_variable_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795964565")
    assert job_end_time() == 1795964565.0


def test_squeue_is_asked_for_the_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "squeue").write_text('#!/bin/sh\n[ "$*" = "--noheader --jobs 7 --format %L" ] && echo 1:40\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    end = job_end_time()
    assert end is not None and abs(end - time.time() - 100) < 5


def test_where_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    assert job_end_time() is None
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795964565")
    assert job_end_time() is None, "not in a job"
