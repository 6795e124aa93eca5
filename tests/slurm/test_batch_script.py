"""The decisions of the batch script that `vppo slurm` writes, on real SLURM: signals, requeueing, arrays.

The script decides by what its ranks do, so a program of a few lines stands in for them. It does one thing per attempt,
as the lines of the file `acts` say: it ends with a status, is killed, waits until it is asked to stop, or leaves word
in the run folder that it is not to be started again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vppo.cli.main import main
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import job_of, submit, wait_for, wait_for_end, wait_for_restart

CONFIG = """
data: {train_files: rows.jsonl}
model: {path: model}
trainer: {project_name: project, experiment_name: run}
"""
STAND_IN = """#!/bin/bash
name=run
for argument; do
    case $argument in trainer.experiment_name=*) name=${argument#*=} ;; esac
done
run=runs/project/$name attempt=${SLURM_RESTART_COUNT:-0}
mkdir -p "$run"
record() { echo "$attempt $SLURM_PROCID $*" >>"$run/record"; }
act=$(sed -n "$((attempt + 1))p" acts)
case $act in
wait*)
    trap 'record asked; asked=yes' USR2
    trap 'record TERM; asked=yes' TERM
    record waits
    while [ -z "${asked:-}" ]; do sleep 0.1; done
    sleep "${act#wait }" # a checkpoint
    record saved
    exit 75 ;;
killed) kill -KILL $$ ;;
no*)
    [ "$SLURM_PROCID" = 0 ] || exec sleep 60 # a rank that does not know that another has failed
    echo "${act#no }" >"$run/do_not_requeue"
    exit 1 ;;
*)
    record "$(hostname) $SLURM_CPUS_PER_TASK $*"
    exit "${act:-0}" ;;
esac
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the script by the command itself, in an empty folder that becomes the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    program = tmp_path / "env/bin/vppo"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN)
    program.chmod(0o755)

    def write(acts: str, *options: str, nodes: int = 1, tasks: int = 2, time: str = "5", settings: str = "") -> Path:
        (tmp_path / "acts").write_text(acts.replace(", ", "\n"))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no question to a SLURM that this process does not know
        monkeypatch.setattr("shutil.which", lambda _: None)
        size = ["--nodes", str(nodes), "--gpus-per-node", str(tasks), "--time", time, "--grace-seconds", "50"]
        command = ["slurm", "--config", "run.yaml", *size, "--environment", "env", *options, *settings.split()]
        assert main(command) == 0
        return tmp_path / "run.sbatch"

    return write


def recorded(folder: Path, name: str = "run") -> list[str]:
    """Lists what the ranks did, sorted: attempt, rank, and what."""
    return sorted((folder / "runs/project" / name / "record").read_text().splitlines())


def test_a_run_that_finishes(cluster: Cluster, write, tmp_path: Path) -> None:
    script = write("0", nodes=2, settings="rollout.n=4 reward.reward_function=my_reward.py:grade")
    leftover = tmp_path / "runs/project/run/do_not_requeue"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("from an earlier job\n")
    done = wait_for_end(cluster, submit(cluster, script))
    assert (done.state, done.exit_code, done.restarts, done.log_text) == ("COMPLETED", 0, 0, "")
    assert not leftover.exists()
    words = "train --config run.yaml rollout.n=4 reward.reward_function=my_reward.py:grade"
    assert recorded(tmp_path) == [f"0 {rank} n{1 + rank // 2} 32 {words}" for rank in range(4)]


def test_what_a_restart_may_cure_is_tried_again(cluster: Cluster, write, tmp_path: Path) -> None:
    job = submit(cluster, write("1, killed, 143, 0", "--max-restarts", "3"))
    for restarts in (1, 2, 3):
        wait_for_restart(cluster, job, restarts)
    done = wait_for_end(cluster, job)
    assert (done.state, done.exit_code, done.restarts) == ("COMPLETED", 0, 3)
    assert {line.split()[0] for line in recorded(tmp_path)} == {"0", "2", "3"}
    again = [line for line in done.log_text.splitlines() if "back into the queue" in line]
    assert [line[-14:] for line in again] == ["1 of at most 3", "2 of at most 3", "3 of at most 3"]
    assert again[1].startswith("status 137: ")


def test_restarts_are_counted(cluster: Cluster, write) -> None:
    job = submit(cluster, write("1, 1, 0", "--max-restarts", "1"))
    wait_for_restart(cluster, job, 1)
    done = wait_for_end(cluster, job)
    assert (done.state, done.exit_code, done.restarts) == ("FAILED", 1, 1)
    assert "not started again: it has been 1 times, and max_restarts is 1" in done.log_text


@pytest.mark.parametrize(
    ("act", "status", "message"),
    [
        ("no column 'answer' in the data", 93, "not started again: column 'answer' in the data"),
        ("93", 93, "not started again: status 93"),
        ("2", 2, "not started again: status 2"),
    ],
)
def test_what_a_restart_cannot_cure_is_not(cluster: Cluster, write, act: str, status: int, message: str) -> None:
    done = wait_for_end(cluster, submit(cluster, write(act)))
    assert (done.state, done.exit_code, done.restarts) == ("FAILED", status, 0)
    assert message in done.log_text.splitlines()


@pytest.mark.parametrize(
    ("lost", "message"), [("env/bin/vppo", " has no vppo; set PATH"), ("run.yaml", "no file run.yaml in /")]
)
def test_a_program_or_a_file_that_is_not_there(
    cluster: Cluster, write, tmp_path: Path, lost: str, message: str
) -> None:
    script = write("0")
    (tmp_path / lost).unlink()
    done = wait_for_end(cluster, submit(cluster, script))
    assert (done.state, done.exit_code, done.restarts) == ("FAILED", 2, 0)
    assert message in done.log_text


@pytest.mark.extended
def test_ranks_are_asked_to_stop_and_start_again(cluster: Cluster, write, tmp_path: Path) -> None:
    """First by SLURM, 50 s before a limit of one minute; then by a user, with either signal."""
    job = submit(cluster, write("wait 0.5, wait 0.5, wait 0.5, 0", nodes=2, tasks=1, time="1"))
    wait_for_restart(cluster, job, 1)
    for restarts, signal in ((1, "USR2"), (2, "TERM")):
        waiting = {f"{restarts} {rank} waits" for rank in range(2)}
        wait_for(cluster, job, lambda _, waiting=waiting: waiting <= set(recorded(tmp_path)))
        cluster.run("scancel", f"--signal={signal}", "--batch", job)
        wait_for_restart(cluster, job, restarts + 1)
    done = wait_for_end(cluster, job)
    assert (done.state, done.restarts) == ("COMPLETED", 3)
    again = [line for line in done.log_text.splitlines() if "back into the queue" in line]
    assert [line.partition(":")[0] for line in again] == ["status 75"] * 3  # theirs, not that of a `wait` cut short
    for did in ("asked", "saved"):
        lines = [line for line in recorded(tmp_path) if line.endswith(did)]
        assert lines == [f"{attempt} {rank} {did}" for attempt in range(3) for rank in range(2)]


def test_a_stop_by_hand_that_is_to_last(cluster: Cluster, write, tmp_path: Path) -> None:
    job = submit(cluster, write("wait 0.5, 0"))
    wait_for(cluster, job, lambda _: (tmp_path / "runs/project/run/record").exists())
    (tmp_path / "runs/project/run/do_not_requeue").write_text("enough for today\n")
    cluster.run("scancel", "--signal=USR2", "--batch", job)
    done = wait_for_end(cluster, job)
    assert (done.state, done.exit_code, done.restarts) == ("FAILED", 93, 0)
    assert "not started again: enough for today" in done.log_text


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, write, tmp_path: Path) -> None:
    """Though its ranks take half a second, and then end as if they had been asked to stop."""
    job = submit(cluster, write("wait 0.5, 0"))
    wait_for(cluster, job, lambda _: (tmp_path / "runs/project/run/record").exists())
    cluster.run("scancel", job)
    done = wait_for(cluster, job, lambda job: "not started again: cancelled" in job.log_text)
    assert job_of(cluster, job).state in ("CANCELLED", "COMPLETING")
    done = wait_for_end(cluster, job)
    assert (done.state, done.restarts) == ("CANCELLED", 0)
    got = {line.split()[-1] for line in recorded(tmp_path)}
    assert got == {"waits", "TERM", "saved"}  # from SLURM; a request of the script's own would be a second one


@pytest.mark.extended
def test_an_array_has_a_run_per_seed(cluster: Cluster, write, tmp_path: Path) -> None:
    """The last task of an array has the array's own number as SLURM_JOB_ID: what it does must not reach the others."""
    job = submit(cluster, write("wait 0.5, 0", "--array-seeds", "1-2"))
    first, last = (lambda _, n=n: (tmp_path / f"runs/project/run_seed{n}/record").exists() for n in (1, 2))
    wait_for(cluster, f"{job}_1", first)
    wait_for(cluster, f"{job}_2", last)
    cluster.run("scancel", "--signal=USR2", "--batch", f"{job}_2")
    wait_for_restart(cluster, f"{job}_2", 1)
    assert job_of(cluster, f"{job}_1").state == "RUNNING"
    assert recorded(tmp_path, "run_seed1") == ["0 0 waits", "0 1 waits"]
    done = wait_for_end(cluster, f"{job}_2")
    assert (done.state, done.restarts) == ("COMPLETED", 1)
    cluster.run("scancel", "--signal=USR2", "--batch", f"{job}_1")
    wait_for_restart(cluster, f"{job}_1", 1)
    done = wait_for_end(cluster, f"{job}_1")
    assert (done.state, done.restarts, done.log.name) == ("COMPLETED", 1, f"run-{job}_1.out")
    for seed in (1, 2):
        words = f"train --config run.yaml trainer.seed={seed} trainer.experiment_name=run_seed{seed}"
        assert all(line.endswith(words) for line in recorded(tmp_path, f"run_seed{seed}") if line.startswith("1 "))


@pytest.mark.extended
def test_a_sweep_has_a_task_per_run(cluster: Cluster, write, tmp_path: Path) -> None:
    """Each task has its own settings, its own run folder and log; sent are those that are asked for."""
    write("0")
    (tmp_path / "sweep.yaml").write_text(
        "name: project\nconfig: run.yaml\nseeds: [1, 2]\nvariants: {a: [], b: ['actor.optim.betas=[0.9, 0.95]']}"
    )
    size = ["--nodes", "1", "--gpus-per-node", "2", "--time", "5", "--grace-seconds", "50", "--environment", "env"]
    assert main(["slurm", "--sweep", "sweep.yaml", *size]) == 0
    job = submit(cluster, tmp_path / "sweep.sbatch", "--array=1,4")
    ends = [wait_for_end(cluster, f"{job}_{task}") for task in (1, 4)]
    assert [(end.state, end.log.name) for end in ends] == [
        ("COMPLETED", f"project-{job}_1.out"), ("COMPLETED", f"project-{job}_4.out")
    ]  # fmt: skip
    own = "trainer.project_name=project trainer.experiment_name="
    for name, words in (
        ("a-seed1", f"train --config run.yaml {own}a-seed1 trainer.seed=1"),
        ("b-seed2", f"train --config run.yaml actor.optim.betas=[0.9, 0.95] {own}b-seed2 trainer.seed=2"),
    ):
        lines = recorded(tmp_path, name)
        assert len(lines) == 2 and all(line.endswith(words) for line in lines), lines
    assert sorted(path.name for path in (tmp_path / "runs/project").iterdir()) == ["a-seed1", "b-seed2"]


def test_sbatch_itself_is_asked(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole head of the script, at its full size: SLURM takes two nodes of eight GPUs here, and not three."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # without a vppo
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    (tmp_path / "run.yaml").write_text(CONFIG)
    size = ["--gpus-per-node", "8", "--time", "24:00:00", "--environment", "env", "--partition", "main"]
    command = ["slurm", "--config", "run.yaml", *size]
    assert main([*command, "--nodes", "3", "--output", "3.sbatch"]) == 1
    assert "node configuration is not available" in capsys.readouterr().out
    assert main([*command, "--nodes", "2"]) == 0
    assert "to start at" in capsys.readouterr().out
    assert main([*command, "--nodes", "2", "--submit"]) == 0
    job = capsys.readouterr().out.split()[-1]
    done = wait_for_end(cluster, job)
    assert (done.state, done.exit_code, done.log.name) == ("FAILED", 2, f"run-{job}.out")  # there is no env/bin/vppo


@pytest.mark.slow
@pytest.mark.extended
def test_a_time_limit_without_a_signal_before_it(cluster: Cluster, write, tmp_path: Path) -> None:
    """A site's SLURM that sends nothing but SIGTERM, at the limit itself, is enough for the job to go on."""
    job = submit(cluster, write("wait 0.5, 0", time="1"), "--signal=B:CONT@1")
    wait_for_restart(cluster, job, 1, seconds=150)
    done = wait_for_end(cluster, job)
    assert (done.state, done.restarts) == ("COMPLETED", 1)
    assert {"0 0 TERM", "0 1 TERM"} <= set(recorded(tmp_path))
