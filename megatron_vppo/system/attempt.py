"""The attempts of a run: each start of its ranks has a name, and a folder of that name for its logs.

All ranks of an attempt find the same name without talking to each other:

    started by          name
    vppo train          attempt_1, attempt_2, ...         the next free one, see `make_attempt_folder`
    srun                job_<job>_<restarts>              and _step_<step> for a later step of the job
    torchrun            torchrun_<run id>_<restarts>      and the job's part in a job
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

ATTEMPT_VARIABLE = "VPPO_ATTEMPT"
"""The environment variable with the attempt's name. `vppo train` sets it for the ranks that it starts."""
LATEST = "latest"
"""The link to the folder of the newest attempt."""
_UNKNOWN = "unnamed"
"""The name where ranks were started in another way: all such attempts append to the same logs."""


def attempt_name(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the name of the attempt that this rank belongs to.

    Raises:
        ValueError: VPPO_ATTEMPT is no name of a folder.
    """
    if name := environment.get(ATTEMPT_VARIABLE):
        return _checked(name)
    parts = []
    if run := environment.get("TORCHELASTIC_RUN_ID"):
        parts.append(f"torchrun_{run}_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}")
    if job := environment.get("SLURM_JOB_ID"):
        parts.append(f"job_{job}_{environment.get('SLURM_RESTART_COUNT') or '0'}")
        if (step := environment.get("SLURM_STEP_ID", "0")) != "0" and not run:
            parts.append(f"step_{step}")
    return re.sub(r"[^\w.-]", "-", "_".join(parts)) or _UNKNOWN


def make_attempt_folder(logs: Path, *, name: str | None) -> str:
    """Makes the folder of an attempt in `logs`, which has to be there, and returns the attempt's name.

    Args:
        name: the name; None: attempt_N, with the first N above all that are there.

    Raises:
        ValueError: it is no name of a folder.
        OSError: the folder cannot be made.
    """
    if name is not None:
        (logs / _checked(name)).mkdir(exist_ok=True)
        return name
    taken = [int(found[1]) for path in logs.iterdir() if (found := re.fullmatch(r"attempt_(\d+)", path.name))]
    for number in itertools.count(max(taken, default=0) + 1):
        with contextlib.suppress(FileExistsError):  # another run in the same folder has just begun
            (logs / f"attempt_{number}").mkdir()
            return f"attempt_{number}"
    raise AssertionError


def link_latest(logs: Path, name: str) -> None:
    """Lets the link `latest` lead to an attempt's folder, in one step. Without links it does nothing."""
    unfinished = logs / f".{LATEST}.{socket.gethostname()}.{os.getpid()}.tmp"
    with contextlib.suppress(OSError):  # a file system without links, a folder of the user's with that name
        try:
            unfinished.symlink_to(name)
            os.replace(unfinished, logs / LATEST)
        finally:
            unfinished.unlink(missing_ok=True)


def _checked(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name) or name == LATEST:
        raise ValueError(
            f"the environment has {ATTEMPT_VARIABLE}={name!r}; it names a folder for logs: letters, digits, '_', '-' "
            "and '.'. Unset it to let vppo choose"
        )
    return name
