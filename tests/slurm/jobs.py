"""Jobs on a test cluster: submit one, wait for what is awaited, read how it ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import Cluster

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
"""The states of a job that does not run again by itself."""


HELD = "launch_failed_requeued_held"
"""The reason of a job that a node did not start, as when it was busy with the end of the last one. SLURM waits for
someone to release it."""


@dataclass(frozen=True)
class Job:
    """One job, or one task of a job array, as SLURM tells of it."""

    id: str
    """Its own number; that of an array's task as `12_1`."""
    state: str
    exit_code: int
    """The status that the batch script ended with."""
    signal: int
    """The signal that ended it, or 0."""
    restarts: int
    reason: str
    node_list: str
    log: Path
    """The file of --output."""

    @property
    def has_ended(self) -> bool:
        """True if it has ended for good."""
        return self.state in ENDED

    @property
    def log_text(self) -> str:
        """The text of its log; '' if there is none."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""


def submit(cluster: Cluster, script: Path, *options: str, cwd: Path | None = None) -> str:
    """Sends a batch script with further options of sbatch, from its own folder, and returns the job's number."""
    printed = cluster.run("sbatch", "--parsable", *options, str(script), cwd=cwd or script.parent)
    return printed.strip().partition(";")[0]


def job_of(cluster: Cluster, job_id: str) -> Job:
    """Returns the job, or the task of an array (`12_1`), as it is now."""
    text = cluster.run("scontrol", "show", "job", "--oneliner", job_id)
    exit_code, _, signal = _value(text, "ExitCode").partition(":")
    return Job(
        id=job_id,
        state=_value(text, "JobState"),
        exit_code=int(exit_code),
        signal=int(signal),
        restarts=int(_value(text, "Restarts")),
        reason=_value(text, "Reason"),
        node_list=_value(text, "NodeList"),
        log=Path(_value(text, "StdOut")),
    )


def release_if_held(cluster: Cluster, job: Job) -> None:
    """Releases a job that waits because a node did not start it."""
    if job.reason == HELD:
        cluster.run("scontrol", "release", job.id)


def wait_for(cluster: Cluster, job_id: str, awaited: Callable[[Job], bool], *, seconds: float = 60) -> Job:
    """Waits until `awaited(job)` and returns the job.

    Raises:
        TimeoutError: it did not come; the message has the job and the end of its log.
    """
    deadline = time.monotonic() + seconds
    while not awaited(job := job_of(cluster, job_id)):
        release_if_held(cluster, job)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {job}\n{job.log_text[-5000:]}")
        time.sleep(0.1)
    return job


def wait_for_end(cluster: Cluster, job_id: str, *, seconds: float = 60) -> Job:
    """Waits until the job has ended for good, restarts included, and returns it."""
    return wait_for(cluster, job_id, lambda job: job.has_ended, seconds=seconds)


def wait_for_restart(cluster: Cluster, job_id: str, restarts: int, *, seconds: float = 60) -> None:
    """Waits until the job is back in the queue for the `restarts`-th time, and lets it start in two seconds.

    SLURM itself waits two minutes. Within the second in which it has killed a job, a node refuses to start it again.
    """
    wait_for(cluster, job_id, lambda job: job.restarts == restarts and job.state == "PENDING", seconds=seconds)
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2")


def wait_for_text(cluster: Cluster, job_id: str, text: str, *, seconds: float = 60) -> Job:
    """Waits until the job's log contains `text`."""
    return wait_for(cluster, job_id, lambda job: text in job.log_text, seconds=seconds)


def _value(text: str, name: str) -> str:
    """Returns the value after `name=` in a line of `scontrol show`."""
    found = re.search(rf"(?:^|\s){name}=(\S*)", text)
    assert found, f"no {name} in {text}"
    return found[1]
