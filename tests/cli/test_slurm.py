"""`vppo slurm` as a user sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vppo.cli.main import main
from megatron_vppo.sweep.plan import plan_sweep
from megatron_vppo.sweep.sweep_file import read_sweep_file
from tests.sweep.folders import write_run

CONFIG = """
data: {train_files: rows.jsonl}
model: {path: model}
parallel: {tensor_model_parallel_size: 4, pipeline_model_parallel_size: 2}
trainer: {runs_dir: results, project_name: geometry, experiment_name: first, save_limit: 2}
"""
SIZE = ("--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in a folder with settings, where PATH has bash and, after `sbatch(status)`, an sbatch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(CONFIG)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(programs))

    def slurm(*options: str, sbatch: str | None = None) -> int:
        if sbatch is not None:
            (programs / "sbatch").write_text(f'#!/bin/bash\necho "sbatch $*"\n{sbatch}\n')
            (programs / "sbatch").chmod(0o755)
        return main(["slurm", "--config", "my.yaml", *SIZE, *options])

    return slurm


def test_a_script_is_written(slurm: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm("--sbatch=--qos=high", "--sbatch=--mail-type=END", "rollout.n=4") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "my.sbatch: 2 x 8 GPUs; tensor 4 x context 1 x pipeline 2 x data 2"
    assert "no sbatch on this machine" in out
    text = (tmp_path / "my.sbatch").read_text()
    for line in (
        "# Written by: vppo slurm --config my.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --sbatch=--qos=high "
        "--sbatch=--mail-type=END rollout.n=4",
        "#SBATCH --job-name=first", "#SBATCH --mail-type=END", "config=my.yaml", "    rollout.n=4 &",
        "run_folder=results/geometry/first # trainer.runs_dir/project_name/experiment_name", "max_restarts=50",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert "save_limit" not in out
    assert slurm("--output", "other.sbatch", "trainer.save_limit=1") == 0
    assert "note: trainer.save_limit=1 leaves no older checkpoint" in capsys.readouterr().out


def test_sbatch_is_asked_and_its_answer_shown(slurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm(sbatch="echo 'Job 7 to start at noon' >&2") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "sbatch --test-only my.sbatch", "Job 7 to start at noon", "send it: sbatch my.sbatch",
    ]  # fmt: skip
    assert slurm("--submit") == 0
    assert capsys.readouterr().out.splitlines()[1] == "sbatch my.sbatch"
    assert slurm(sbatch="echo 'allocation failure' >&2; exit 1") == 1
    assert "allocation failure" in capsys.readouterr().out


def test_nothing_is_sent_without_sbatch(slurm) -> None:
    assert slurm("--submit") == 1


def test_seeds_and_containers_reach_the_script(slurm, tmp_path: Path) -> None:
    assert slurm("--array-seeds", "1-3", "--container", "image.sif", "--container-runtime", "apptainer") == 0
    text = (tmp_path / "my.sbatch").read_text()
    assert "#SBATCH --array=1-3\n" in text and "apptainer exec --nv" in text and "name=first_seed$SLURM_ARR" in text


SWEEP = """
name: study
config: my.yaml
seeds: [1, 2]
variants: {wide: [], narrow: [parallel.pipeline_model_parallel_size=1]}
"""


@pytest.fixture
def sweep(slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    (tmp_path / "study.yaml").write_text(SWEEP)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return lambda *options: main(["slurm", "--sweep", "study.yaml", *SIZE, *options])


def test_a_sweep_is_an_array(slurm, sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("rollout.n=4") == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "study.sbatch: 4 runs, each on 2 x 8 GPUs; tensor 4 x context 1 x pipeline 2 x data 2, or tensor 4 x context 1 "
        "x pipeline 1 x data 4"
    )
    text = (tmp_path / "study.sbatch").read_text()
    assert "#SBATCH --job-name=study\n" in text and "#SBATCH --array=1-4\n" in text
    assert "run_folder=results/study/$name" in text
    assert (
        "2) name=narrow-seed1 config=my.yaml\n   settings=(parallel.pipeline_model_parallel_size=1 rollout.n=4 "
        "trainer.project_name=study trainer.experiment_name=narrow-seed1 trainer.seed=1) ;;\n"
    ) in text


def test_finished_runs_are_not_sent(slurm, sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan_sweep(read_sweep_file(tmp_path / "study.yaml")).runs
    for run in (runs[0], runs[2]):
        write_run(run, {0: [1.0]})
    slurm(sbatch="true")
    capsys.readouterr()
    assert sweep("--submit") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sbatch --array=2,4 study.sbatch"
    assert sweep() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "send it: sbatch --array=2,4 study.sbatch"
    for run in runs:
        write_run(run, {0: [1.0]})
    assert sweep("--submit") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all of its runs are finished"


def test_a_sweep_that_cannot_be(sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--array-seeds", "1-3") == 2
    assert "a sweep file has the seeds of --sweep" in capsys.readouterr().err
    assert sweep("parallel.tensor_model_parallel_size=3") == 2
    assert "does not divide 16 ranks" in capsys.readouterr().err
    write_run(plan_sweep(read_sweep_file(tmp_path / "study.yaml")).runs[0], {0: [1.0]})
    assert sweep("rollout.n=4", "--output", "x.sbatch") == 2
    assert "made with other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sweep("--config", "my.yaml")
    assert not list(tmp_path.glob("*.sbatch"))


@pytest.mark.parametrize(
    ("runs_dir", "mounts", "is_seen"),
    [
        ("runs", None, True),
        ("/scratch/runs", None, False),
        ("/scratch/runs", "/data", False),
        ("/scratch/runs", "/data:/hub,/scratch", True),
        ("/scratch/runs", "/gpfs/me:/scratch:rw", True),
    ],
)
def test_checkpoints_that_a_container_may_keep_are_noted(
    slurm, capsys: pytest.CaptureFixture[str], runs_dir: str, mounts: str | None, is_seen: bool
) -> None:
    given = [] if mounts is None else ["--container-mounts", mounts]
    assert slurm("--container", "image", *given, f"trainer.runs_dir={runs_dir}") == 0
    assert ("note: if the image does not see /scratch/runs" in capsys.readouterr().out) is not is_seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rolout.n=4"], "did you mean rollout"),
        (["parallel.tensor_model_parallel_size=3"], "= 6 ranks per model copy does not divide 16 ranks"),
        (["parallel.data_parallel_size=4"], "x data_parallel_size 4 = 32, but there are 16 ranks"),
        (["rollout.tensor_parallel_size=16"], "rollout.tensor_parallel_size 16: an engine lies within one node"),
        (["fp8.bf16_layers_at_ends=2"], "set fp8.recipe or rollout.quantization"),
        (["--container-mounts", "/data"], "set --container to its image"),
        (["--container", "x.sif", "--environment", ".venv"], "vppo has to be in the image"),
        (["--container", ""], "--container is empty"),
        (["--array-seeds", "1-2", "trainer.experiment_name='a #b'"], "a #b_seed1 reads as 'a'"),
        (["--array-seeds", "1-2", "trainer.experiment_name='[a]'"], "'trainer.experiment_name=[a]_seed1' is not valid"),
        (["--grace-seconds", "70000"], "sbatch takes at most 65535"),
        (["--output", "nowhere/x.sbatch"], "there is no folder nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_a_job_waits(
    slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert slurm(*options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.sbatch"))
