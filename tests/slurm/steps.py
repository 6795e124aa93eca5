"""One batch script of several `vppo train`, each with the training of stand_in/, and the output of each."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import submit, wait_for_end

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "slurm" / "stand_in"
SRUN = "srun --kill-on-bad-exit=1"
CONFIG = """
data: {{train_files: {folder}/rows.jsonl, rollout_batch_size: 8}}
model: {{path: {folder}/model, dtype: float32}}
actor: {{global_batch_size: 8}}
trainer: {{runs_dir: {runs}, project_name: project, experiment_name: run}}
"""
_SECTION = re.compile(r"^--- step (\d+)\n(.*?)^--- status (\d+)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """The output of a command of the script, and its exit status."""

    text: str
    status: int

    @property
    def messages(self) -> list[str]:
        """The messages of `vppo` to the user, without those of SLURM."""
        return re.findall(r"^vppo: .*(?:\n  - .*)*", self.text, re.MULTILINE)


def train(launcher: str, *overrides: str, **environment: str) -> str:
    """The command `vppo train` as `launcher` starts it, with a few variables of its own."""
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    vppo = f"{sys.executable} -m megatron_vppo.cli.main train --config config.yaml {' '.join(overrides)}"
    return f"env {settings} {launcher} {vppo}"


def write_script(folder: Path, *commands: str, runs: Path | None = None, preflight: str = "none") -> Path:
    """Writes a script that runs one command after the other, and the configuration that they use."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, runs=runs or folder))
    lines = ["#!/bin/bash", f"export PYTHONPATH={ROOT}:{STAND_IN} VPPO_TEST_PREFLIGHT={preflight}"]
    for number, command in enumerate(commands):
        lines += [f"echo '--- step {number}'", f"{command} 2>&1", 'echo "--- status $?"']
    (folder / "job.sh").write_text("\n".join(lines) + "\n")
    return folder / "job.sh"


def run_steps(cluster: Cluster, script: Path, *options: str, seconds: float = 300) -> list[Step]:
    """Runs the script as a job and returns what each command did."""
    job = wait_for_end(cluster, submit(cluster, script, *options), seconds=seconds)
    return read_steps(job.log_text)


def read_steps(log: str) -> list[Step]:
    return [Step(text, int(status)) for _, text, status in _SECTION.findall(log)]
