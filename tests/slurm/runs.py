"""Runs of the real program on a test cluster, by the batch script that `vppo slurm` writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.proofs.runs import ROOT, VPPO
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import submit

VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_script(cluster: Cluster, script: Path, arguments: Sequence[str], options: Sequence[str]) -> None:
    """Lets `vppo slurm` write a batch script.

    Args:
        arguments: those of `vppo train`, which begin with `train --config FILE`.
        options: further ones of `vppo slurm`.
    """
    config = arguments[1:3]
    command = [*VPPO, "slurm", *config, "--environment", sys.prefix, "--output", str(script), *options, *arguments[3:]]
    path = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    done = subprocess.run(command, cwd=ROOT, env={**cluster.environment, **path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def send_script(cluster: Cluster, script: Path, log: Path, variables: Mapping[str, str] | None = None) -> str:
    """Submits a script of `write_script` and returns the job's number.

    Args:
        log: the file for the job's log; `%a` in it is the number of an array's task.
        variables: further environment variables of the ranks.
    """
    values = {**VARIABLES, **(variables or {})}
    if "PYTHONPATH" in os.environ:
        values["PYTHONPATH"] = os.environ["PYTHONPATH"]
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in values.items())])
    return submit(cluster, script, f"--export={export}", f"--output={log}", cwd=ROOT)
