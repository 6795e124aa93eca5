"""The attempts of a run, that is each start of its ranks, with the step it began at. A requeued job has several."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from megatron_vppo.observability.json_lines import dump_line, parse_lines
from megatron_vppo.system.attempt import attempt_name
from megatron_vppo.system.slurm import job_id, restart_count

FILE = "attempts.jsonl"
ENDED_ON_REQUEST = "on request"
FINISHED = "finished"


def begin_attempt(run_folder: Path, start_step: int, *, most_without_progress: int) -> None:
    """Writes down that an attempt begins at a step. Rank 0 calls it.

    Raises:
        ValueError: this job was requeued, and as many attempts as may be began at the same step and got no further.
    """
    path, job, restart = run_folder / FILE, job_id(), restart_count()
    without_progress = _attempts_from(path, job, start_step) if restart else 0
    if without_progress >= most_without_progress:
        raise ValueError(
            f"job {job} began {without_progress} times at step {start_step} and never reached a further checkpoint; "
            f"{run_folder / 'logs'} says why. Submit it again when that is mended "
            f"(trainer.max_attempts_without_progress={most_without_progress})"
        )
    run_folder.mkdir(parents=True, exist_ok=True)
    line = {"attempt": attempt_name(), "job": job, "restart": restart, "start_step": start_step}
    _append(path, {**line, "host": socket.gethostname()})


def end_attempt(run_folder: Path, ended: str) -> None:
    """Writes down that this attempt ended without a failure, FINISHED or ENDED_ON_REQUEST. Rank 0 calls it."""
    line = {"attempt": attempt_name(), "job": job_id(), "restart": restart_count(), "ended": ended}
    _append(run_folder / FILE, line)


def is_finished(run_folder: Path) -> bool:
    """Returns True if the last attempt of the run came to its last step, and nothing began after it."""
    lines = _lines(run_folder / FILE)
    return bool(lines) and lines[-1].get("ended") == FINISHED


def has_begun(run_folder: Path) -> bool:
    """Returns True if an earlier attempt of this SLURM job has begun: what is in the folder is this job's own then."""
    job, restart = job_id(), restart_count()
    if not job or not restart:
        return False
    return any(line.get("job") == job and line.get("restart") != restart for line in _lines(run_folder / FILE))


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(dump_line({"time": round(time.time(), 3), **line}))


def _attempts_from(path: Path, job: str | None, start_step: int) -> int:
    """Counts the last attempts in a row that are of this job and began at this step."""
    count = 0
    for attempt in reversed(_lines(path)):
        if attempt.get("job") != job or attempt.get("start_step") != start_step:  # also one that ended on request
            break
        count += 1
    return count


def _lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines; one that is no JSON is left out: the disk was full, or the host lost its power."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return list(parse_lines(file))
