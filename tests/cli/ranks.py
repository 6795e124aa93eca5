"""`vppo train` on two ranks with the training of stand_in/: started by itself, by torchrun, or as srun starts tasks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "cli" / "stand_in"
CONFIG = """
data: {{train_files: rows.jsonl, rollout_batch_size: 8}}
model: {{path: model, dtype: float32}}
actor: {{global_batch_size: 8}}
trainer: {{runs_dir: {folder}, project_name: project, experiment_name: run}}
"""
VPPO = ("-m", "megatron_vppo.cli.main")
TORCHRUN = ("-m", "torch.distributed.run")


def logs_of(folder: Path, attempt: str = "attempt_1") -> Path:
    return folder / "project" / "run" / "logs" / attempt


def train_command(folder: Path, *overrides: str) -> list[str]:
    """The arguments of Python for `vppo train`, with a run folder below `folder`."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder))
    return [*VPPO, "train", "--config", str(config), *overrides]


def environment(failure: str, **more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(STAND_IN)])
    return {**os.environ, "PYTHONPATH": paths, "VPPO_TEST_FAILURE": failure, **more}


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def train(folder: Path, failure: str, *overrides: str, **more: str) -> tuple[int, str, str]:
    return finish(start(train_command(folder, *overrides), environment(failure, **more)))


def train_under_srun(folder: Path, failure: str, *overrides: str, **more: str) -> list[tuple[int, str, str]]:
    """Two tasks with the variables that srun sets; each has a terminal of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = train_command(folder, *overrides)
    tasks = [
        start(
            command,
            environment(
                failure, SLURM_JOB_ID="7", SLURM_PROCID=str(task), SLURM_LOCALID=str(task), SLURM_STEP_NUM_TASKS="2",
                MASTER_PORT=port, **more,
            ),
        )
        for task in range(2)
    ]  # fmt: skip
    return [finish(task) for task in tasks]
