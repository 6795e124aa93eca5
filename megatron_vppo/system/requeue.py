"""The word of a run to the batch script of its SLURM job: it is not to be started again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

DO_NOT_REQUEUE = "do_not_requeue"
"""The file in the run folder. The batch script removes it before a run, and requeues the job only without it."""


def do_not_requeue(run_folder: Path, reason: str) -> None:
    """Leaves the word, with its reason, if this process belongs to a SLURM job."""
    if os.environ.get("SLURM_JOB_ID"):
        with contextlib.suppress(OSError):  # the exit status says the same
            (run_folder / DO_NOT_REQUEUE).write_text(reason + "\n", encoding="utf-8")
