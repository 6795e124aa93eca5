"""The word of a run to the batch script of its SLURM job: it is not to be started again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megatron_vppo.system.slurm import job_id

DO_NOT_REQUEUE = "do_not_requeue"
"""The file in the run folder. The batch script removes it before a run, and requeues the job only without it."""
PATH_VARIABLE = "VPPO_DO_NOT_REQUEUE"
"""The environment variable in which the batch script says where it looks for the file."""


def do_not_requeue(run_folder: Path | None, reason: str) -> None:
    """Leaves the word, with its reason, if this process belongs to a SLURM job.

    The exit status says the same, but it may not reach the script: srun reports that of a task which it has ended
    instead, if another task was still starting.

    Args:
        run_folder: None: it is not known yet, and the script alone knows where it looks.
    """
    given = os.environ.get(PATH_VARIABLE)
    path = Path(given) if given else None if run_folder is None else run_folder / DO_NOT_REQUEUE
    if job_id() is not None and path is not None:
        with contextlib.suppress(OSError):
            path.write_text(reason + "\n", encoding="utf-8")
