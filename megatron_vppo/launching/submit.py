"""A batch script on its way to SLURM: looked at by bash and sbatch, sent. Only where their programs are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def has_slurm() -> bool:
    """Returns True if jobs can be sent from this machine."""
    return shutil.which("sbatch") is not None


def check_syntax(text: str) -> None:
    """Refuses a script that bash cannot read; it is not run."""
    looked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    if looked.returncode:
        raise ValueError(f"bash cannot read the script, so it is not written: {looked.stderr.strip()}")


def try_script(path: Path) -> tuple[bool, str]:
    """Returns whether SLURM would take the job, and what it says: when it would start, or why it never would."""
    return _sbatch("--test-only", path)


def send_script(path: Path, *, array: str | None = None) -> tuple[bool, str]:
    """Sends the job; returns whether SLURM took it, and what it says.

    Args:
        array: the tasks to send in place of all that the script names; None: all.
    """
    return _sbatch(*([] if array is None else [f"--array={array}"]), path)


def _sbatch(*arguments: str | Path) -> tuple[bool, str]:
    done = subprocess.run(["sbatch", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode == 0, f"{done.stdout}{done.stderr}".strip()
