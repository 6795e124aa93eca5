"""The variables by which SLURM tells a process which task of which step it is, read without SLURM's programs.

Containers have the variables, but not `scontrol`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_PARTS = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class SlurmTask:
    """One of several tasks that a `srun` has started."""

    rank: int
    size: int
    """The number of tasks of the step."""
    local_rank: int
    """The task's number among those of its host."""
    host_number: int
    """The number of its host among `hosts`."""
    hosts: tuple[str, ...]
    """The hosts of the step, in SLURM's order. Empty if SLURM does not name them."""
    name: str | None
    """The job, the attempt and the step in one word, which no two steps share; None if SLURM does not name them."""


def read_task(environment: Mapping[str, str]) -> SlurmTask | None:
    """Returns the task that this process is; None if no `srun` has started it, or if it is the only task of its step.

    Raises:
        ValueError: a variable that should be a number is none, or the list of hosts cannot be read.
    """
    # SLURM_PROCID and SLURM_NTASKS are set in the shell of a batch script as well.
    if "SLURM_PROCID" not in environment or environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    job, step = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_ID")
    attempt = environment.get("SLURM_RESTART_COUNT", "0")
    return SlurmTask(
        rank=whole_number(environment, "SLURM_PROCID"),
        size=whole_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=whole_number(environment, "SLURM_LOCALID", default="0"),
        host_number=whole_number(environment, "SLURM_NODEID", default="0"),
        hosts=expand_hosts(environment.get("SLURM_STEP_NODELIST", "")),
        name=None if job is None or step is None else f"{job}.{attempt}.{step}",
    )


def whole_number(environment: Mapping[str, str], variable: str, *, default: str | None = None) -> int:
    """Reads a rank or a size. Raises ValueError if the variable is no whole number."""
    value = environment.get(variable, default)
    if value is None or not value.isdecimal():
        raise ValueError(
            f"the environment has {variable}={value!r}, which is no rank or size; torchrun or srun sets it. Unset it "
            "to let vppo start the ranks"
        )
    return int(value)


def job_id() -> str | None:
    """Returns the number of the job that this process belongs to; None outside a job."""
    return os.environ.get("SLURM_JOB_ID") or None


def restart_count() -> int:
    """Returns how often SLURM has started this job again; 0 outside a job."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def idle_hosts(environment: Mapping[str, str]) -> int:
    """Counts the hosts of a job that this process would leave idle, because no `srun` has started it on them."""
    if "SLURM_JOB_ID" not in environment or "SLURM_STEP_ID" in environment:
        return 0
    hosts = environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", "1"))
    return int(hosts) - 1 if hosts.isdecimal() else 0


def expand_hosts(text: str) -> tuple[str, ...]:
    """Lists the hosts of SLURM's short form: `n[08-10,12],login` are n08, n09, n10, n12 and login.

    Raises:
        ValueError: the text is not of this form.
    """
    # A comma within brackets does not separate hosts.
    entries = re.findall(r"(?:\[[^\]]*\]|[^,\[])+|\[", text)
    return tuple(host for entry in entries for host in _expand_entry(entry.strip(), text))


def _expand_entry(entry: str, text: str) -> list[str]:
    pieces = _PARTS.split(entry)  # literal, numbers, literal, numbers, ..., literal
    if any("[" in piece or "]" in piece for piece in pieces):
        raise ValueError(f"the environment has SLURM_STEP_NODELIST={text!r}, whose brackets do not match")
    choices = [[piece] if i % 2 == 0 else _expand_numbers(piece, text) for i, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _expand_numbers(numbers: str, text: str) -> list[str]:
    found: list[str] = []
    for part in numbers.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(f"the environment has SLURM_STEP_NODELIST={text!r}; {part!r} is no range of numbers")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
