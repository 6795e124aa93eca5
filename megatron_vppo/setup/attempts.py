"""The attempts of a run, that is each start of its ranks, with the step it began at. A requeued job has several."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_vppo.observability.json_lines import dump_line

FILE = "attempts.jsonl"


def begin_attempt(run_folder: Path, start_step: int, *, most_without_progress: int) -> None:
    """Writes down that an attempt begins at a step. Rank 0 calls it.

    Raises:
        ValueError: this job was requeued, and as many attempts as may be began at the same step and got no further.
    """
    path, job, restart = run_folder / FILE, os.environ.get("SLURM_JOB_ID"), _restart_count()
    without_progress = _attempts_from(path, job, start_step) if restart else 0
    if without_progress >= most_without_progress:
        raise ValueError(
            f"job {job} began {without_progress} times at step {start_step} and never reached a further checkpoint; "
            f"{run_folder / 'logs'} says why. Submit it again when that is mended "
            f"(trainer.max_attempts_without_progress={most_without_progress})"
        )
    line = {
        "time": round(time.time(), 3),
        "job": job,
        "restart": restart,
        "start_step": start_step,
        "host": socket.gethostname(),
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(dump_line(line))


def _restart_count() -> int:
    """Returns how often SLURM has started this job again; 0 outside a job."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def _attempts_from(path: Path, job: str | None, start_step: int) -> int:
    """Counts the last attempts in a row that are of this job and began at this step."""
    count = 0
    for line in reversed(path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
        try:
            attempt: dict[str, Any] = json.loads(line)
        except ValueError:  # the disk was full, or the host lost its power
            continue
        if attempt.get("job") != job or attempt.get("start_step") != start_step:
            break
        count += 1
    return count
