"""The batch script as text: quoting, options, containers, and what is refused. tests/slurm runs it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import PurePath

import pytest

from megatron_vppo.launching.sbatch import ArrayTask, BatchJob, Container, script_of, seconds_of

JOB = BatchJob(
    command=("vppo", "slurm", "--config", "my run.yaml"),
    job_name="run",
    nodes=4,
    gpus_per_node=8,
    time="24:00:00",
    config="my run.yaml",
    overrides=("actor.optim.betas=[0.9, 0.95]",),
    run_folder=PurePath("runs/project/it's a run"),
)
SHOW = """srun() { printf '<%s>' "$@" >words; }
vppo() { :; }
SLURM_JOB_ID=7 SLURM_CPUS_ON_NODE=64 SLURM_NTASKS_PER_NODE=8 SLURM_ARRAY_JOB_ID=5 SLURM_ARRAY_TASK_ID=2
set -u
"""


def lines_of(job: BatchJob) -> list[str]:
    return script_of(job).splitlines()


def words_of_srun(job: BatchJob, folder: PurePath) -> str:
    """Runs the script with functions in place of SLURM's programs, and returns the words that srun was given."""
    (folder / "my run.yaml").touch()
    subprocess.run(["bash", "-c", SHOW + script_of(job)], cwd=folder, check=True, stderr=subprocess.PIPE, text=True)
    return (folder / "words").read_text()


def test_sbatch_reads_its_options_before_the_first_command() -> None:
    lines = lines_of(replace(JOB, partition="gpu", account="us", options=("--qos=high", "-C h100")))
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=run", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive", "--mem=0",
        "--time=24:00:00", "--signal=B:USR2@600", "--requeue", "--open-mode=append", "--output=%x-%j.out",
        "--partition=gpu", "--account=us", "--qos=high", "-C h100",
    ]  # fmt: skip
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") or not line for line in lines[:last])
    assert max(map(len, lines)) <= 110


def test_one_gpu_is_no_gpus() -> None:
    assert "on 1 node of 1 GPU, one task" in lines_of(replace(JOB, nodes=1, gpus_per_node=1))[1]


def test_the_words_of_srun(tmp_path) -> None:
    assert words_of_srun(JOB, tmp_path) == (
        "<--kill-on-bad-exit=1><--distribution=block><--cpus-per-task=8>"
        "<vppo><train><--config><my run.yaml><actor.optim.betas=[0.9, 0.95]>"
    )


def test_each_seed_has_its_run(tmp_path) -> None:
    job = replace(JOB, seeds="1-3")
    assert words_of_srun(job, tmp_path).endswith("<trainer.seed=2><trainer.experiment_name=it's a run_seed2>")
    assert "#SBATCH --array=1-3" in lines_of(job) and "#SBATCH --output=%x-%A_%a.out" in lines_of(job)


def test_each_task_has_its_own_file_and_settings(tmp_path) -> None:
    tasks = (
        ArrayTask("a-seed1", "my run.yaml", ("x=1",)),
        ArrayTask("b-seed1", "my run.yaml", ("actor.optim.betas=[0.9, 0.95]", "y=it's")),
    )
    job = replace(JOB, config="", overrides=(), tasks=tasks, run_folder=PurePath("runs/a study"))
    assert words_of_srun(job, tmp_path).endswith(
        "<vppo><train><--config><my run.yaml><actor.optim.betas=[0.9, 0.95]><y=it's>"
    )
    assert (tmp_path / "runs/a study/b-seed1").is_dir(), "the run folder of task 2"
    lines = lines_of(job)
    assert "#SBATCH --array=1-2" in lines and "#SBATCH --output=%x-%A_%a.out" in lines
    assert "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" in "\n".join(lines)
    third = script_of(job).replace("case $SLURM_ARRAY_TASK_ID", "case 3")
    done = subprocess.run(["bash", "-c", SHOW + third], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "this script has no run 2" in done.stderr
    with pytest.raises(ValueError, match="would not be one line"):
        replace(job, tasks=(ArrayTask("a", "x.yaml", ("x=1\n2",)),))


def test_the_environment_comes_first_in_path() -> None:
    assert "export PATH=\"$PWD\"/'my env'/bin:$PATH" in lines_of(replace(JOB, environment="my env"))
    assert "export PATH=/opt/env/bin:$PATH" in lines_of(replace(JOB, environment="/opt/env"))
    assert not [line for line in lines_of(JOB) if line.startswith("export PATH")]


def test_containers(tmp_path) -> None:
    pyxis = Container("pyxis", "nvcr.io#nvidia/pytorch:26.01", "/data:/data,/home/me/my hub:/hub")
    assert (
        words_of_srun(replace(JOB, container=pyxis), tmp_path)
        .partition("<--cpus-per-task=8>")[2]
        .startswith(
            "<--container-image=nvcr.io#nvidia/pytorch:26.01><--no-container-mount-home>"
            f"<--container-mounts={tmp_path}:{tmp_path},/data:/data,/home/me/my hub:/hub>"
            f"<--container-workdir={tmp_path}><vppo><train>"
        )
    )
    apptainer = Container("apptainer", "vppo image.sif")
    job = replace(JOB, container=apptainer, environment=".venv")
    assert (
        words_of_srun(job, tmp_path)
        .partition("<--cpus-per-task=8>")[2]
        .startswith(f"<apptainer><exec><--nv><--bind><{tmp_path}><--pwd><{tmp_path}><vppo image.sif><vppo><train>")
    )
    assert "command -v vppo" not in script_of(job)  # it is in the image
    assert "export PATH" not in script_of(job)


@pytest.mark.parametrize(
    ("squeue", "end"), [("echo 2027-01-31T12:00:00", "1801396800"), ("return 1", ""), (":", ""), ("echo N/A", "")]
)
def test_the_end_of_the_job_is_passed_on_where_squeue_tells_it(tmp_path, squeue: str, end: str) -> None:
    """To `date` no text at all is midnight, at which the time of every job was over."""
    (tmp_path / "my run.yaml").touch()
    text = SHOW.replace("words; }", 'words; echo "$SLURM_JOB_END_TIME" >end; }') + f"squeue() {{ {squeue}; }}\n"
    command = ["bash", "-c", text + script_of(JOB)]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "TZ": "UTC"}, capture_output=True)
    assert (tmp_path / "end").read_text().strip() == end


def test_the_run_folder_is_the_one_that_is_looked_at(tmp_path) -> None:
    folder = tmp_path / "runs/project/it's a run"
    folder.mkdir(parents=True)
    (folder / "do_not_requeue").touch()
    words_of_srun(JOB, tmp_path)
    assert not (folder / "do_not_requeue").exists()


@pytest.mark.parametrize(("refusals", "asked"), [(0, 1), (2, 3), (9, 4)])
def test_requeueing_is_tried_again(tmp_path, refusals: int, asked: int) -> None:
    """The controller may be down while the job ends."""
    (tmp_path / "my run.yaml").touch()
    stand_ins = f"""
        srun() {{ return 1; }}; command() {{ :; }}; squeue() {{ :; }}; sleep() {{ :; }}
        scontrol() {{ echo "$*" >>asked; [ "$(wc -l <asked)" -gt {refusals} ]; }}
    """
    environment = {**os.environ, "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", stand_ins + script_of(JOB)], cwd=tmp_path, env=environment)
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * asked
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 90 * 60), ("90:30", 90 * 60 + 30), ("24:00:00", 86400), ("2-12", 60 * 3600), ("1-2:03", 26 * 3600 + 180),
        ("1-02:03:04", 26 * 3600 + 184), ("unlimited", None),
    ],
)  # fmt: skip
def test_time_limits_as_the_manual_of_sbatch_has_them(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "one day"}, "--time 'one day' is no time limit"),
        ({"time": "0:0"}, "no time limit"),
        ({"time": "1:2:3:4"}, "no time limit"),
        ({"time": "10"}, "--time 10 is 600 s, and the run would be asked to stop 600 s before"),
        ({"options": ("qos=high",)}, "is no option of sbatch"),
        ({"options": ("--container-image=x",)}, "set --container, which is for the ranks"),
        ({"options": ("--time=1:00:00",)}, "is set by --time"),
        ({"options": ("-N 3",)}, "is set by --nodes"),
        ({"options": ("-N3",)}, "is set by --nodes"),
        ({"options": ("--qos=high --nodes 3",)}, "is set by --nodes"),
        ({"options": ("--comment=it's",)}, "cannot be read: No closing quotation"),
        ({"options": ("--array=1-3",)}, "is set by --array-seeds"),
        ({"options": ("--qos=a\nrm -rf x",)}, "would not be one line"),
        ({"job_name": "a\nb"}, "would not be one line"),
        ({"seeds": "1 2"}, "--array-seeds '1 2' is no list of seeds"),
        ({"seeds": "1-9%0"}, "no list of seeds"),
        ({"seeds": "1,5-3"}, "--array-seeds '1,5-3': 5-3 runs backwards"),
        ({"seeds": "4294967296"}, "a seed of more than 2147483647"),
        ({"seeds": "1-3", "overrides": ("trainer.seed=4",)}, "leave out 'trainer.seed=4'"),
    ],
)
def test_what_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        replace(JOB, **changes)
    assert message in str(refused.value)


@pytest.mark.parametrize("seeds", ["1-3", "1,5,9", "0-8:2", "1-9%2"])
def test_lists_of_seeds(seeds: str) -> None:
    assert f"#SBATCH --array={seeds}" in lines_of(replace(JOB, seeds=seeds))
