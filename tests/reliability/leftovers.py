"""Things that a run leaves behind on a test cluster besides its results."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import psutil

from tests.slurm.cluster import Cluster

STEP_DAEMON = "slurmstepd"
"""The name of SLURM's own process for a step. Whatever else a job starts has the job's number in its environment."""
CACHES = ("torchinductor_",)
"""Beginnings of the names of what is to stay in the folder for temporary files."""
OF_ATTEMPTS = re.compile(r"(logs|attempts\.jsonl|do_not_requeue|tensorboard)(/|$)")
"""The things that a run folder has of each attempt."""
PATIENCE_SECONDS = 20.0


def left_behind(cluster: Cluster, temporary: Path) -> list[str]:
    """Lists processes, temporary files and shared memory that are still there some time after a run's end."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := [*_processes(cluster), *_files(cluster, temporary)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def differing_files(run: Path, expected: Path) -> list[str]:
    """Lists the files that a run folder has and another run's has not, with `+`, and the other way round, with `-`."""
    here, there = _contents(run), _contents(expected)
    return [f"+{name}" for name in sorted(here - there)] + [f"-{name}" for name in sorted(there - here)]


def _processes(cluster: Cluster) -> list[str]:
    found = []
    for node in cluster.site.names:
        for process in cluster.processes(node):
            with contextlib.suppress(psutil.Error):
                if process.name() == STEP_DAEMON or "SLURM_JOB_ID" in process.environ():
                    found.append(f"{node}: process {process.pid}, {' '.join(process.cmdline())[:200]}")
    return found


def _files(cluster: Cluster, temporary: Path) -> list[str]:
    found = [str(path) for path in temporary.iterdir() if not path.name.startswith(CACHES)]
    for node in cluster.site.names:
        found += [f"{node}: /dev/shm/{path.name}" for path in cluster.folder_on(node, "/dev/shm").iterdir()]
    return found


def _contents(run: Path) -> set[str]:
    names = (path.relative_to(run).as_posix() for path in run.rglob("*"))
    return {name for name in names if not OF_ATTEMPTS.match(name)}
