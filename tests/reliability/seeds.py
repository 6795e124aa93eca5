"""A job array of seeds whose tasks share their head node, all at the same time."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.proofs.runs import train
from tests.reliability.comparison import differing_numbers
from tests.reliability.leftovers import left_behind
from tests.reliability.settings import PROJECT, TWO_RANKS, arguments
from tests.slurm.cluster import Cluster, Site
from tests.slurm.jobs import job_of, wait_for_end
from tests.slurm.runs import send_script, write_script

STEPS = 3
SETTINGS = (f"trainer.total_steps={STEPS}", "trainer.save_freq=-1", "trainer.val_freq=-1")
TOGETHER_SECONDS = 60.0
"""The time in which all tasks have to run at one moment."""


def run(options: argparse.Namespace, digits: Path, scratch: Path) -> tuple[str, list[str]]:
    """Runs `--seeds` seeds side by side on the same two nodes. Returns a line about it, and the faults."""
    scratch.mkdir()
    temporary, script = scratch / "tmp", scratch / "seeds.sbatch"
    temporary.mkdir()
    numbers = range(1, options.seeds + 1)
    with Cluster(scratch / "slurm", Site(nodes=2, node_timeout=5)) as cluster:
        size = ("--nodes", "2", "--gpus-per-node", "1", "--time", "60", "--array-seeds", f"1-{options.seeds}")
        write_script(cluster, script, arguments(digits, scratch / "runs", "array", *SETTINGS), size)
        _share_nodes(script)
        job_id = send_script(cluster, script, scratch / "seed_%a.out", {"TMPDIR": str(temporary)})
        together = _run_together(cluster, [f"{job_id}_{number}" for number in numbers])
        jobs = {number: wait_for_end(cluster, f"{job_id}_{number}", seconds=1800) for number in numbers}
        faults = [f"seed {n} ended {job.state}: {job.log}" for n, job in jobs.items() if job.state != "COMPLETED"]
        faults += [] if together else ["the tasks did not run at the same time"]
        faults += left_behind(cluster, temporary)
    for number in [] if faults else numbers:
        alone = train(digits, scratch / "runs", f"alone_{number}", *TWO_RANKS, *SETTINGS, f"trainer.seed={number}")
        found = differing_numbers(scratch / "runs" / PROJECT / f"array_seed{number}", alone)
        faults += [f"seed {number}: {fault}" for fault in found]
    heads = {job.node_list for job in jobs.values()}
    return f"{len(jobs)} seeds as a job array at the same time on {', '.join(heads)}: each equal to a run alone", faults


def _share_nodes(script: Path) -> None:
    """Takes out the lines by which a job has its nodes to itself."""
    text = script.read_text().replace("#SBATCH --exclusive\n", "").replace("#SBATCH --mem=0\n", "#SBATCH --mem=1000\n")
    script.write_text(text)


def _run_together(cluster: Cluster, tasks: list[str]) -> bool:
    """Waits for a moment at which all tasks run; False if there is none."""
    deadline = time.monotonic() + TOGETHER_SECONDS
    while time.monotonic() < deadline:
        states = [job_of(cluster, task).state for task in tasks]
        if states == ["RUNNING"] * len(tasks):
            return True
        time.sleep(0.2)
    return False
