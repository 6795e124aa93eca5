"""`vppo sweep` as a user sees it. Runs are written by hand; tests/proofs/test_sweep.py has real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vppo.cli import sweep as command
from megatron_vppo.cli.main import main
from megatron_vppo.sweep.plan import Sweep, SweepRun, plan_sweep
from megatron_vppo.sweep.sweep_file import read_sweep_file
from tests.sweep.folders import CONFIG, SWEEP, write_run

FINISH = """
import sys
from pathlib import Path
from megatron_vppo.sweep.plan import plan_sweep
from megatron_vppo.sweep.sweep_file import read_sweep_file
from tests.sweep.folders import write_run
(run,) = [run for run in plan_sweep(read_sweep_file(Path("sweep.yaml"))).runs if run.name == sys.argv[1]]
with open("ran", "a") as ran:
    print(run.name, file=ran)
if run.name in Path("failing").read_text():
    sys.exit(1)
write_run(run, {0: [0.0, 0.0], 10: [float(run.variant == "vppo"), 1.0]})
"""
"""Stands for `vppo train`."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sweep whose runs take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "base.yaml").write_text(CONFIG)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "failing").touch()
    real = command.train_command
    monkeypatch.setattr(command, "train_command", lambda run: [real(run)[0], "-c", FINISH, run.name])
    return tmp_path


def planned(folder: Path) -> Sweep:
    return plan_sweep(read_sweep_file(folder / "sweep.yaml"))


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().split()


def test_the_command_of_a_run_is_vppo_train(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(CONFIG)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    run: SweepRun = planned(tmp_path).runs[1]
    assert command.train_command(run)[1:] == [
        "-m", "megatron_vppo.cli.main", "train", "--config", str(tmp_path / "base.yaml"),
        "algorithm.use_vppo_on_perception=false", "algorithm.use_advantage_shaping=false",
        "trainer.project_name=study", "trainer.experiment_name=dapo-seed1", "trainer.seed=1",
    ]  # fmt: skip


def test_failed_runs_are_told_and_tried_again_and_finished_ones_are_not(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "failing").write_text("dapo-seed1")
    assert main(["sweep", "sweep.yaml"]) == 1
    out = capfd.readouterr().out
    assert ran(folder) == ["vppo-seed1", "dapo-seed1", "vppo-seed2", "dapo-seed2"]
    assert "sweep: 4 of 4 runs are to do, 0 are finished" in out
    assert "| dapo (baseline) | 1 of 2 | 10 | 0.0 | 50.0 |" in out
    assert "sweep: dapo-seed1 failed (status 1); the same command tries it again" in out
    (folder / "failing").write_text("")
    (folder / "ran").unlink()
    assert main(["sweep", "sweep.yaml"]) == 0
    out = capfd.readouterr().out
    assert ran(folder) == ["dapo-seed1"]
    assert "| vppo | 2 of 2 | 10 | 0.0 ± 0.0 | 100.0 ± 0.0 | 2 | +50.0 |" in out
    (folder / "ran").unlink()
    assert main(["sweep", "sweep.yaml"]) == 0
    assert not (folder / "ran").exists()


def test_the_list_and_the_report_start_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = planned(folder).runs
    write_run(first, {0: [0.0, 0.0], 10: [1.0, 1.0]})
    write_run(second, {0: [0.0, 0.0]}, finished=False)
    assert main(["sweep", "sweep.yaml", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "vppo-seed1  finished, step 10", "dapo-seed1  unfinished, step 0", "vppo-seed2  not begun",
        "dapo-seed2  not begun",
    ]  # fmt: skip
    assert main(["sweep", "sweep.yaml", "--report"]) == 0
    assert "vppo: compared with dapo at step 0" in capsys.readouterr().out
    assert not (folder / "ran").exists()
    results = json.loads((folder / "runs/study/results.json").read_text())
    assert [variant["finished"] for variant in results["variants"]] == [[1], []]
    assert "<h1>study</h1>" in (folder / "runs/study/report.html").read_text()


def test_other_settings_are_listed_and_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(planned(folder).runs[0], {0: [0.0]})
    assert main(["sweep", "sweep.yaml", "rollout.n=4", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "vppo-seed1  other settings, step 0", "              rollout.n was 8 and is 4",
    ]  # fmt: skip
    for options in ([], ["--report"]):
        assert main(["sweep", "sweep.yaml", "rollout.n=4", *options]) == 2
        assert "runs of the same names were made with other settings" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_a_mistake_in_any_variant_is_told_before_the_first_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sweep.yaml").write_text(SWEEP.replace("use_advantage_shaping", "use_advantage_shapin"))
    assert main(["sweep", "sweep.yaml"]) == 2
    assert "did you mean algorithm.use_advantage_shaping?" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_one_process_alone_runs_a_sweep(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["sweep", "sweep.yaml"]) == 2
    assert "start it without srun and torchrun" in capsys.readouterr().err
