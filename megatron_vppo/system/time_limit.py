"""The end of a SLURM job's time, as SLURM says it."""

from __future__ import annotations

import os
import re
import subprocess
import time

from megatron_vppo.system.slurm import job_id

_ASK_SECONDS = 20.0


def job_end_time() -> float | None:
    """Returns when the time of this SLURM job ends, in seconds since 1970. None: no job, no limit, or it is not known.

    SLURM 23 and later, and our batch scripts, set SLURM_JOB_END_TIME. Otherwise `squeue` is asked, which may not be
    there in a container.
    """
    job = job_id()
    if job is None:
        return None
    given = os.environ.get("SLURM_JOB_END_TIME", "")
    if given.isdecimal():
        return float(given)
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%L"],
            capture_output=True, text=True, timeout=_ASK_SECONDS, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    left = seconds_left(asked.stdout)
    return None if left is None else time.time() + left


def seconds_left(text: str) -> float | None:
    """Reads a time left as `squeue` prints it: [days-][hours:]minutes:seconds. None: it is another word (UNLIMITED)."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
