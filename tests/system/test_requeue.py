"""The word to the batch script."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.system.requeue import do_not_requeue


def test_the_word_is_left_in_a_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    do_not_requeue(tmp_path, "finished")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    do_not_requeue(tmp_path, "finished")
    assert (tmp_path / "do_not_requeue").read_text() == "finished\n"
    do_not_requeue(tmp_path / "nowhere", "the exit status says it too")
    do_not_requeue(None, "nobody knows where")
    monkeypatch.setenv("VPPO_DO_NOT_REQUEUE", str(tmp_path / "elsewhere"))
    do_not_requeue(None, "a mistake")
    assert (tmp_path / "elsewhere").read_text() == "a mistake\n"
