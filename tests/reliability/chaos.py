"""Proof under fire: disturbs real runs on a real SLURM cluster of this machine, and prints what came of it.

    make chaos ARGS="--minutes 30"
    make chaos ARGS="--only kills --minutes 120 --seed 7"

Needs root and SLURM (`tools/install/slurm.sh`), as tests/slurm/ does. Ends with status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.proofs.conftest import make_digits
from tests.proofs.runs import train
from tests.reliability import memory, requeues, seeds
from tests.reliability.kills import KINDS, SETTINGS, Disturber, Kill, Round
from tests.reliability.settings import TWO_RANKS
from tests.slurm.cluster import Cluster, Site

PARTS = ("kills", "seeds", "memory", "requeues")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts; all by default")
    parser.add_argument("--minutes", type=float, default=30, help="time of the kills; the last run is finished")
    parser.add_argument("--gap", type=float, nargs=2, default=(10, 60), help="seconds from one kill to the next")
    parser.add_argument("--requeues", type=int, default=20, help="time limits that the one run meets in a row")
    parser.add_argument("--seeds", type=int, default=3, help="tasks of the job array, side by side")
    parser.add_argument("--steps", type=int, default=450, help="of the runs of memory and requeues")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    options = parser.parse_args(arguments)
    if options.steps < memory.FEWEST_STEPS:
        parser.error(f"--steps {options.steps}: no line can be drawn through fewer than {memory.FEWEST_STEPS}")
    scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
    tell(f"files: {scratch}; removed if everything goes well")
    digits = make_digits(scratch / "digits", "--train-pairs", "256", "--val-pairs", "16")
    faults: list[str] = []
    for part in options.only:
        tell(f"--- {part}")
        table, found = _PARTS[part](options, digits, scratch / part)
        print(f"\n{table}\n", flush=True)
        faults += [f"{part}: {fault}" for fault in found]
    print("\n".join(["FAULTS", *faults]) if faults else "No fault.")
    if not faults:
        shutil.rmtree(scratch)
    return 1 if faults else 0


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def kills(options: argparse.Namespace, digits: Path, scratch: Path) -> tuple[str, list[str]]:
    """Kills for as long as it is told. Returns the table and the faults."""
    scratch.mkdir()
    expected = train(digits, scratch / "runs", "undisturbed", *TWO_RANKS, *SETTINGS)
    rounds: list[Round] = []
    rng, end = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    with Cluster(scratch / "slurm", Site(nodes=2, kill_wait=2, node_timeout=5)) as cluster:
        disturber = Disturber(
            cluster, digits=digits, expected=expected, scratch=scratch, rng=rng, gap_seconds=options.gap, tell=tell
        )
        while time.monotonic() < end:
            rounds.append(disturber.run(len(rounds) + 1))
            tell(f"round {rounds[-1].number}: {'; '.join(rounds[-1].faults) or 'equal to the undisturbed run'}")
    return kills_table(rounds), [f"round {this.number}: {fault}" for this in rounds for fault in this.faults]


def kills_table(rounds: Sequence[Round]) -> str:
    """Returns the kills by kind, and the rounds."""
    everything = [kill for this in rounds for kill in this.kills]
    lines = ["| SIGKILL to | times | job restarted | s to the next step, median | longest |", "|---|---|---|---|---|"]
    lines += [_kind_line(kind, [kill for kill in everything if kill.kind == kind]) for kind in KINDS]
    lines += [_kind_line("all", everything), ""]
    equal = sum(not this.faults for this in rounds)
    seconds, restarts = sum(this.seconds for this in rounds), sum(this.restarts for this in rounds)
    lines.append(
        f"{len(rounds)} runs of {seconds / 60:.0f} minutes together, {len(everything)} kills, {restarts} restarts of "
        f"jobs; {equal} runs equal the undisturbed one bit by bit and left nothing behind"
    )
    return "\n".join(lines)


def _kind_line(name: str, kills: Sequence[Kill]) -> str:
    times = [kill.recovered_after for kill in kills if kill.recovered_after is not None]
    median, longest = (f"{statistics.median(times):.0f}", f"{max(times):.0f}") if times else ("", "")
    return f"| {name} | {len(kills)} | {sum(kill.job_restarted for kill in kills)} | {median} | {longest} |"


_PARTS = {"kills": kills, "seeds": seeds.run, "memory": memory.run, "requeues": requeues.run}

if __name__ == "__main__":
    sys.exit(main())
