"""Signals that ask a process to end at the next good moment, seen at once, whatever the process is doing.

Python runs a signal handler between two lines of Python. A trainer rank can wait for minutes in a collective, or in a
kernel. So the signals are blocked in every thread, and one thread of ours waits for them. Processes that are started
later inherit the block: SLURM sends a signal to all processes of a job step, and one that is meant for the trainer does
not end its engines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from multiprocessing import resource_tracker

SAME_REQUEST_SECONDS = 30.0
"""Signals within this time of the first belong to one request: SLURM sends SIGTERM, twice, and the batch script SIGUSR2
as soon as SLURM's controller answers it."""
_ignored = threading.Event()


class StopRequested(Exception):
    """The run ends in the middle of a step. What the step has done so far is thrown away."""


def block_stop_signals(signals: Collection[signal.Signals]) -> None:
    """Blocks signals in this thread and in threads and processes that it starts. Call it before others are started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def ignore_stop_signals() -> None:
    """Makes this process deaf to signals from now on, because it is about to end with a status of its own.

    srun ends all tasks by SIGTERM when one has failed.
    """
    _ignored.set()
    with contextlib.suppress(ValueError):  # not the main thread, and then there is a thread that waits for signals
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StopSignals:
    """Waits for signals in a thread.

    Until `begin_work` there is nothing to lose: a signal ends the process at once. After that the first signal is a
    request, and one that comes SAME_REQUEST_SECONDS later or more ends the process at once.
    """

    def __init__(self, signals: Collection[signal.Signals], *, ended_by: int | None = None) -> None:
        """Blocks the signals and begins to wait for them.

        Args:
            ended_by: a process whose SIGTERM is no request, but ends this one at once; None: there is none.
        """
        self._signals = frozenset(signals)
        self._ended_by = ended_by
        self._working = False
        self._request: tuple[signal.Signals, float] | None = None
        block_stop_signals(self._signals)
        # Python's tracker of shared resources unblocks SIGTERM in the thread that starts it (3.11 does), which would be
        # in the middle of the run. Started here, it inherits the blocked signals.
        resource_tracker.ensure_running()
        block_stop_signals(self._signals)
        threading.Thread(target=self._wait, name="stop signals", daemon=True).start()

    @property
    def request(self) -> signal.Signals | None:
        """The signal that asked this process to stop; None: no one has."""
        return self._request[0] if self._request else None

    @property
    def seconds_since_request(self) -> float:
        """The time since the request; 0 if there is none."""
        return time.monotonic() - self._request[1] if self._request else 0.0

    def begin_work(self) -> None:
        """Says that from now on there is work to save."""
        self._working = True

    def _wait(self) -> None:
        while True:
            info = signal.sigwaitinfo(self._signals)
            received = signal.Signals(info.si_signo)
            if _ignored.is_set():
                continue
            ends = received == signal.SIGTERM and info.si_pid == self._ended_by
            if ends or not self._working or self.seconds_since_request >= SAME_REQUEST_SECONDS:
                print(f"ended by {received.name}", file=sys.stderr, flush=True)
                os._exit(128 + received)
            if self._request is None:
                self._request = (received, time.monotonic())
