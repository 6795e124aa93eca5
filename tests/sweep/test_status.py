"""The state of a run, read from its folder, and runs that were made with other settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.setup.attempts import begin_attempt
from megatron_vppo.sweep.status import RunStatus, check_settings, status_of
from tests.sweep.folders import SWEEP, make_sweep, write_run


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_how_far_a_run_is(tmp_path: Path) -> None:
    run, *_ = make_sweep(tmp_path).runs
    assert status_of(run) == RunStatus("not begun", None)
    write_run(run, {0: [1.0], 2: [1.0]}, finished=False)
    assert status_of(run) == RunStatus("unfinished", 2)
    write_run(run, {0: [1.0], 2: [1.0], 4: [1.0]})
    assert status_of(run) == RunStatus("finished", 4)
    begin_attempt(run.folder, 4, most_without_progress=1)
    assert status_of(run) == RunStatus("unfinished", 4)


def test_other_settings_are_named(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    write_run(sweep.runs[0], {0: [1.0]})
    changed = make_sweep(
        tmp_path, SWEEP, "rollout.n=4", "trainer.total_steps=7", "trainer.save_freq=3", "parallel.threads_per_rank=2"
    )
    status = status_of(changed.runs[0])
    assert status.state == "other settings"
    assert status.differences == ("rollout.n was 8 and is 4", "trainer.total_steps was None and is 7")
    states = {run.name: status_of(run) for run in changed.runs}
    with pytest.raises(ValueError, match=r"(?s)remove their folders.*vppo-seed1: rollout\.n was 8 and is 4; trainer"):
        check_settings(changed.runs, states)


def test_where_and_how_a_run_trains_may_change(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    write_run(sweep.runs[0], {0: [1.0]})
    changed = make_sweep(tmp_path, SWEEP, "trainer.save_freq=3", "parallel.tensor_model_parallel_size=2")
    assert status_of(changed.runs[0]).state == "finished"
    check_settings(changed.runs, {run.name: status_of(run) for run in changed.runs})


def test_settings_that_cannot_be_read_are_others(tmp_path: Path) -> None:
    run = make_sweep(tmp_path).runs[0]
    write_run(run, {0: [1.0]})
    (run.folder / "config.yaml").write_text("model: {path: x, size: 3}")
    status = status_of(run)
    assert status.state == "other settings" and "model.size" in status.differences[0]
