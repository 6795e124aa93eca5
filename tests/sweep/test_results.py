"""Results from run folders written by hand: means over seeds, pairs of questions, runs that are not finished."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_vppo.observability.validations import VALIDATIONS
from megatron_vppo.sweep.answers import accuracies, steps_of_all
from megatron_vppo.sweep.plan import Sweep
from megatron_vppo.sweep.results import ACCURACY, SweepResults, gather_results
from megatron_vppo.sweep.status import status_of
from tests.sweep.folders import SWEEP, make_sweep, write_run

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def gather(sweep: Sweep) -> SweepResults:
    return gather_results(sweep, {run.name: status_of(run) for run in sweep.runs})


def test_accuracies_are_means_over_samples_and_over_runs(tmp_path: Path) -> None:
    def line(row: int, accuracy: object, **changes: object) -> dict[str, object]:
        return {"split": "val", "row": row, "problem": "p", "answer": "a", "accuracy": accuracy, **changes}

    VALIDATIONS.write(tmp_path / "a", 4, [line(0, 1.0), line(0, 0.0), line(1, 1.0), line(2, "NaN"), line(3, None)])
    VALIDATIONS.write(tmp_path / "b", 4, [line(0, 0.0), line(1, 0.0), line(1, 0.5), line(9, 1.0)])
    found = accuracies([tmp_path / "a", tmp_path / "b"], 4)
    assert found == {("val", 0, "p", "a"): 0.25, ("val", 1, "p", "a"): 0.625}
    VALIDATIONS.write(tmp_path / "c", 4, [line(0, 1.0, answer="other"), line(1, 1.0)])
    assert accuracies([tmp_path / "a", tmp_path / "c"], 4) == {("val", 1, "p", "a"): 1.0}, "another question"
    VALIDATIONS.write(tmp_path / "a", 2, [])
    assert steps_of_all([tmp_path / "a", tmp_path / "b"]) == [4] and steps_of_all([]) == []


def test_variants_over_their_seeds(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    start = [0.0, 0.0, 1.0, 0.0]
    for run, end in zip(
        sweep.runs, ([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]),
        strict=True,
    ):  # fmt: skip
        write_run(run, {0: start, 10: end})
    vppo, dapo = gather(sweep).variants
    assert vppo.seeds == vppo.finished == (1, 2) and vppo.curves[ACCURACY].steps == (0, 10)
    first, last = vppo.curves[ACCURACY].estimates
    assert (first.mean, first.error) == (0.25, 0.0) and (last.mean, last.error) == (0.75, 0.0)
    spread = dapo.curves[ACCURACY].estimates[1]  # 0.25 and 0.5: standard deviation 0.125 sqrt 2
    assert spread.mean == 0.375 and spread.error == pytest.approx(0.125, rel=EXACT)
    assert vppo.curves["val/reward_score"].estimates[1].mean == 0.375
    assert vppo.curves["critic/score/mean"].steps == ()
    # By question, over seeds: vppo 1, 0.5, 1, 0.5; dapo 0.5, 0, 1, 0. Differences 0.5, 0.5, 0, 0.5.
    assert dapo.difference is None and vppo.difference is not None
    assert (vppo.difference.step, vppo.difference.seeds) == (10, (1, 2))
    test = vppo.difference.test
    assert (test.questions, test.difference) == (4, 0.375)
    assert test.p_value == pytest.approx(2 / 8, rel=EXACT)
    assert 0 <= test.low < 0.375 < test.high <= 0.5 and not math.isnan(test.low)


def test_finished_runs_count_alone_where_there_are_any(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    write_run(sweep.runs[0], {0: [0.0, 1.0], 5: [1.0, 1.0], 10: [1.0, 1.0]})
    write_run(sweep.runs[2], {0: [0.0, 0.0], 5: [0.0, 0.0]}, finished=False)
    write_run(sweep.runs[1], {0: [0.0, 1.0], 5: [0.0, 1.0]}, finished=False)
    vppo, dapo = gather(sweep).variants
    assert vppo.seeds == vppo.finished == (1,) and vppo.curves[ACCURACY].estimates[-1].mean == 1.0
    assert vppo.curves[ACCURACY].estimates[-1].error is None, "one seed has no spread"
    assert dapo.seeds == (1,) and dapo.finished == () and dapo.curves[ACCURACY].steps == (0, 5)
    assert vppo.difference is not None and vppo.difference.step == 5, "the last step that both have"
    assert vppo.difference.test.difference == 0.5


def test_unfinished_runs_count_at_the_steps_that_all_have_reached(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    write_run(sweep.runs[0], {0: [0.0], 5: [1.0], 10: [1.0]}, finished=False)
    write_run(sweep.runs[2], {0: [0.0], 5: [0.0]}, finished=False)
    assert gather(sweep).variants[0].curves[ACCURACY].steps == (0, 5)


def test_why_a_variant_is_not_compared(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    assert gather(sweep).variants[0].why_not == "no seed has begun in both"
    write_run(sweep.runs[0], {0: [1.0]})
    write_run(sweep.runs[3], {0: [1.0]})
    assert gather(sweep).variants[0].why_not == "no seed has begun in both"
    write_run(sweep.runs[1], {0: [1.0]}, recorded=False)
    assert "trainer.save_rollouts" in str(gather(sweep).variants[0].why_not)
    write_run(sweep.runs[1], {0: [1.0]})
    assert gather(sweep).variants[0].difference is not None
    VALIDATIONS.write(sweep.runs[1].folder, 0, [{"split": "val", "row": 0, "problem": "other", "accuracy": 1.0}])
    assert gather(sweep).variants[0].why_not == "they have not answered the same questions"


def test_runs_with_other_settings_do_not_count(tmp_path: Path) -> None:
    for run in make_sweep(tmp_path).runs:
        write_run(run, {0: [1.0]})
    assert gather(make_sweep(tmp_path, SWEEP, "rollout.n=4")).variants[0].seeds == ()
