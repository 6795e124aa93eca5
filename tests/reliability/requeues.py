"""A job that meets its time limit again and again, and goes on each time."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from pathlib import Path

from tests.proofs.runs import train
from tests.reliability import memory
from tests.reliability.comparison import differing_numbers
from tests.reliability.leftovers import differing_files, left_behind
from tests.reliability.settings import PATIENT, PROJECT, TWO_RANKS, arguments, last_step, long_settings
from tests.slurm.cluster import Cluster, Site
from tests.slurm.jobs import Job, job_of, release_if_held
from tests.slurm.runs import send_script, write_script

LIMIT_MINUTES = 60
GRACE_SECONDS = 30
"""The time before the limit at which SLURM sends SIGUSR2. It looks every 30 seconds."""
STUCK_SECONDS = 900.0


def run(options: argparse.Namespace, digits: Path, scratch: Path) -> tuple[str, list[str]]:
    """Lets one run meet its time limit `--requeues` times. Returns a line about it, and the faults.

    The undisturbed run is that of memory.py, if there is one.
    """
    scratch.mkdir()
    settings = long_settings(options.steps)
    expected = memory.run_folder(scratch.parent)
    if not expected.is_dir():
        expected = train(digits, scratch / "runs", "undisturbed", *TWO_RANKS, *settings)
    temporary, script = scratch / "tmp", scratch / "requeued.sbatch"
    temporary.mkdir()
    run = scratch / "runs" / PROJECT / "requeued"
    with Cluster(scratch / "slurm", Site(nodes=2, node_timeout=5)) as cluster:
        size = ("--nodes", "2", "--gpus-per-node", "1", "--time", str(LIMIT_MINUTES), "--max-restarts", "1000")
        words = arguments(digits, scratch / "runs", "requeued", *settings, *PATIENT)
        write_script(cluster, script, words, (*size, "--grace-seconds", str(GRACE_SECONDS)))
        job_id = send_script(cluster, script, scratch / "requeued.out", {"TMPDIR": str(temporary)})
        job, limits = _meet_limits(cluster, job_id, run, options.requeues)
        faults = _faults(job, run, expected) or left_behind(cluster, temporary)
    if limits < options.requeues or job.restarts < limits:
        faults.append(f"{limits} of {options.requeues} time limits and {job.restarts} restarts; more --steps?")
    ends = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    asked = sum(line.get("ended") == "on request" for line in ends)
    table = (
        f"{limits} time limits in a row: {job.restarts} restarts, {asked} of them after a checkpoint on request; "
        f"{'equal to' if not faults else 'NOT equal to'} a run without a limit"
    )
    return table, faults


def _meet_limits(cluster: Cluster, job_id: str, run: Path, wanted: int) -> tuple[Job, int]:
    """Lowers the job's time limit after each first step of an attempt, until it was met often enough.

    SLURM knows whole minutes only. Returns the job at its end, and how many limits it met.
    """
    limits, step, furthest, began, changed = 0, 0, 0, 0.0, time.monotonic()
    is_low = False
    while not (job := job_of(cluster, job_id)).has_ended and time.monotonic() - changed < STUCK_SECONDS:
        if (now := last_step(run)) > furthest:
            furthest, changed = now, time.monotonic()
        release_if_held(cluster, job)
        if job.state == "PENDING" and is_low:
            limits, is_low, began, changed = limits + 1, False, 0.0, time.monotonic()
            cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={LIMIT_MINUTES}", "StartTime=now+2")
        elif job.state == "RUNNING" and began == 0.0:
            began, step = time.monotonic(), now
        elif job.state == "RUNNING" and not is_low and limits < wanted and now > step:
            # Every second limit is over already: SIGTERM at once, without the signal before it.
            minutes = max(1, math.ceil((time.monotonic() - began) / 60) - limits % 2)
            with contextlib.suppress(RuntimeError):  # it ends at this moment
                cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")
                is_low, changed = True, time.monotonic()
        time.sleep(0.3)
    return job, limits


def _faults(job: Job, run: Path, expected: Path) -> list[str]:
    if (job.state, job.exit_code) != ("COMPLETED", 0):
        return [f"the job ended {job.state} with status {job.exit_code}; its log: {job.log}"]
    files = [f"in the run folder: {name}" for name in differing_files(run, expected)]
    return differing_numbers(run, expected) + files
