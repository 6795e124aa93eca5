"""SIGKILL at random moments to whatever a run consists of, and the power of whole nodes cut.

One round is a run from its first step to its last. It ends with the numbers of a run that nobody disturbed, or it is a
failure.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.reliability import victims
from tests.reliability.comparison import differing_numbers
from tests.reliability.leftovers import differing_files, left_behind
from tests.reliability.settings import PATIENT, PROJECT, arguments, last_step, size_on_two_hosts
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, job_of, release_if_held
from tests.slurm.runs import send_script, write_script

KINDS = (*victims.PROCESSES, victims.NODE)
STEPS = 12
SETTINGS = (
    f"trainer.total_steps={STEPS}", "trainer.save_freq=1", "trainer.save_limit=2", "trainer.val_freq=4",
    "trainer.val_before_train=true",
)  # fmt: skip
SEARCH_SECONDS = 30.0
"""The time that a victim may take to appear: a writer of checkpoints lives for some milliseconds of a step."""
STUCK_SECONDS = 900.0
"""The time without a further step after which a round is given up."""


@dataclass
class Kill:
    """One kill, and what came of it."""

    kind: str
    step: int
    """The last step that was done."""
    time: float
    restarts: int
    """The number of times that the job had been requeued before."""
    recovered_after: float | None = None
    """The seconds until a further step was done; None: the round ended before."""
    job_restarted: bool = False
    """True if the job was requeued before the next kill and before a further step."""


@dataclass
class Round:
    """A run that was disturbed."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    restarts: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    """The things that are wrong with its end; empty: nothing."""


class Disturber:
    """Runs rounds on a cluster of two nodes."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        digits: Path,
        expected: Path,
        scratch: Path,
        rng: random.Random,
        gap_seconds: tuple[float, float],
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            expected: the folder of the undisturbed run.
            scratch: a folder that both nodes see.
            gap_seconds: the shortest and the longest time from one kill to the next.
        """
        self._cluster = cluster
        self._digits = digits
        self._expected = expected
        self._scratch = scratch
        self._rng = rng
        self._gap_seconds = gap_seconds
        self._tell = tell
        self._deck: list[str] = []

    def run(self, number: int, *, most_kills: int | None = None) -> Round:
        """Runs one round and returns what happened. The files of a round without a fault are removed."""
        began, this = time.monotonic(), Round(number)
        name = f"round_{number}"
        run, temporary = self._scratch / "runs" / PROJECT / name, self._scratch / f"tmp_{number}"
        temporary.mkdir()
        script, log = self._scratch / f"{name}.sbatch", self._scratch / f"{name}.out"
        words = arguments(self._digits, self._scratch / "runs", name, *SETTINGS, *PATIENT)
        write_script(self._cluster, script, words, size_on_two_hosts())
        job = self._disturb(send_script(self._cluster, script, log, {"TMPDIR": str(temporary)}), run, this, most_kills)
        this.restarts, this.seconds = job.restarts, time.monotonic() - began
        this.faults += self._faults(job, run, temporary)
        if not this.faults:
            shutil.rmtree(run)
            shutil.rmtree(temporary)
        return this

    # --- A run, and kills ---------------------------------------------------------------------------------------------

    def _disturb(self, job_id: str, run: Path, this: Round, most_kills: int | None) -> Job:
        """Kills until the job has ended for good, and lets it start again at once each time. Returns it."""
        next_kill, progress = time.monotonic() + self._gap(), time.monotonic()
        step = 0
        while not (job := job_of(self._cluster, job_id)).has_ended:
            self._let_start(job)
            if (now := last_step(run)) > step:
                step, progress = now, time.monotonic()
            self._note_recoveries(this, step, job)
            if time.monotonic() - progress > STUCK_SECONDS:
                this.faults.append(f"no further step for {STUCK_SECONDS:.0f} s after step {step}")
                self._cluster.run("scancel", job_id)
                progress = time.monotonic()
            enough = most_kills is not None and len(this.kills) >= most_kills
            if job.state == "RUNNING" and time.monotonic() > next_kill and not enough:
                self._kill_one(this, job.id, run, step)
                next_kill = time.monotonic() + self._gap()
            time.sleep(0.2)
        self._note_recoveries(this, last_step(run), job)
        return job

    def _let_start(self, job: Job) -> None:
        """SLURM starts a requeued job after two minutes, and one whose launch failed when it is released."""
        release_if_held(self._cluster, job)
        if job.state == "PENDING" and job.reason == "BeginTime":
            with contextlib.suppress(RuntimeError):  # it starts at this moment
                self._cluster.run("scontrol", "update", f"JobId={job.id}", "StartTime=now+2")
            time.sleep(2.5)

    def _kill_one(self, this: Round, job_id: str, run: Path, step: int) -> None:
        """Kills something of the next kind.

        Args:
            step: the furthest step so far. The metrics end earlier where a restart has dropped what is done again.
        """
        kind = self._next_kind()
        if kind == victims.NODE:
            node = self._rng.choice(self._cluster.site.names)
            self._cluster.cut_power(node)
            moment = time.monotonic()
            restarts = job_of(self._cluster, job_id).restarts
            self._cluster.power_on(node)
            what = node
        else:
            victim = self._search(kind)
            if victim is None:
                return
            moment = time.monotonic()
            restarts = job_of(self._cluster, job_id).restarts  # it may have been requeued during the search
            what = f"process {victim.pid}"
        kill = Kill(kind, max(step, last_step(run)), moment, restarts)
        this.kills.append(kill)
        self._tell(f"round {this.number}: {kind} killed ({what}) after step {kill.step}")

    def _search(self, kind: str) -> psutil.Process | None:
        """Kills a process of a kind as soon as there is one, and returns it."""
        deadline = time.monotonic() + SEARCH_SECONDS
        while time.monotonic() < deadline:
            victim = victims.find(self._cluster, kind, self._rng.choice)
            if victim is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                    return victim
        return None

    def _next_kind(self) -> str:
        """Deals the kinds in random order, each as often as any other."""
        if not self._deck:
            self._deck = self._rng.sample(KINDS, len(KINDS))
        return self._deck.pop()

    def _gap(self) -> float:
        return self._rng.uniform(*self._gap_seconds)

    def _note_recoveries(self, this: Round, step: int, job: Job) -> None:
        for kill in this.kills:
            if kill.recovered_after is None and step > kill.step:
                kill.recovered_after = time.monotonic() - kill.time
        if this.kills and this.kills[-1].recovered_after is None:
            this.kills[-1].job_restarted |= job.restarts > this.kills[-1].restarts

    # --- Its end ------------------------------------------------------------------------------------------------------

    def _faults(self, job: Job, run: Path, temporary: Path) -> list[str]:
        if (job.state, job.exit_code) != ("COMPLETED", 0):
            return [f"the job ended {job.state} with status {job.exit_code}; its log: {job.log}"]
        return [
            *differing_numbers(run, self._expected),
            *(f"in the run folder: {name}" for name in differing_files(run, self._expected)),
            *(f"left behind: {what}" for what in left_behind(self._cluster, temporary)),
        ]
