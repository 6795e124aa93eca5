"""The runs of a sweep, one after the other, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from megatron_vppo.sweep.plan import SweepRun
from megatron_vppo.system.processes import die_with_parent

_PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGHUP,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGTERM,
}
"""Signals that end a sweep, and what the run gets for each. After SIGTERM it saves its state first."""


@dataclass
class SweepOutcome:
    """The ends of the runs."""

    failed: dict[str, int] = field(default_factory=dict)
    """Exit statuses of those that failed, by name; below zero: the signal that ended it."""
    stopped_by: int | None = None
    """The exit status of the sweep if it ended before its last run."""


def execute(
    runs: Sequence[SweepRun],
    command: Callable[[SweepRun], Sequence[str]],
    *,
    stopped: int,
    say: Callable[[str], None],
) -> SweepOutcome:
    """Runs what is not finished. A run that fails is noted, and the next one begins.

    SIGINT, SIGTERM, SIGUSR2 and SIGHUP are passed on to the run that is going on, and end the sweep after it. The run
    is not in the terminal's foreground, so that it gets each once. It is killed if this process is.

    Args:
        command: returns the program and its arguments that does a run.
        stopped: the exit status of a run that was asked to stop and has saved its state. It ends the sweep, too.
    """
    outcome = SweepOutcome()
    with _runner() as runner:
        for number, run in enumerate(runs, start=1):
            say(f"sweep: {run.name} ({number} of {len(runs)}), in {run.folder}")
            status = runner.run(command(run))
            if status == stopped:
                outcome.stopped_by = stopped
            elif runner.received:
                outcome.stopped_by = 128 + runner.received[0]
            elif status != 0:
                outcome.failed[run.name] = status
                say(f"sweep: {run.name} failed: {_end(status)}")
            if outcome.stopped_by is not None:
                say(f"sweep: stopped in {run.name}; the same command goes on from there")
                break
    return outcome


def _end(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"


class _Runner:
    """Starts processes, and passes signals on to the one that is running."""

    def __init__(self) -> None:
        self.received: list[int] = []
        """The signals that came."""
        self._unsent: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, words: Sequence[str]) -> int:
        """Returns the exit status of a program."""
        parent = os.getpid()
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=lambda: die_with_parent(parent)
        )
        while self._unsent:  # it came while there was no process yet
            self._send(self._unsent.pop())
        status = self._process.wait()
        self._process = None
        return status

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        if self._process is None:
            self._unsent.append(number)
        else:
            self._process.send_signal(_PASSED_ON[signal.Signals(number)])


@contextmanager
def _runner() -> Iterator[_Runner]:
    """Receives signals within the block, except for those that this process ignores, as under nohup."""
    runner = _Runner()
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    taken = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, runner.receive)
    try:
        yield runner
    finally:
        for number in taken:
            signal.signal(number, before[number])
