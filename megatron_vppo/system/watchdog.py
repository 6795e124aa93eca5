"""A limit to the time of what a process does again and again, made of the times that it took before.

A thread waits for the limit. It then writes the stacks of all threads to standard error and raises `TookTooLong`, which
whoever owns the process finds with `threading.excepthook`. Where another thread holds the interpreter's lock and waits,
Python's faulthandler, which needs no lock, does the first half a little later and ends the process with status 1.
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

KNOWN = 3
"""The number of times that have to be known before there is a limit."""
REMEMBERED = 20
"""The number of times that the median is taken of."""
GRACE_SECONDS = 30.0
"""The time from the stacks to the end of the process, in which other processes reach their limits and write theirs."""
LOCKED_SECONDS = 60.0
"""The time after GRACE_SECONDS until faulthandler acts."""
TICK_SECONDS = 5.0
"""The time between two looks at the clock. Where one comes much later, the whole process was stopped meanwhile, as by
`scontrol suspend`, which is no fault of the work."""


class Hangs(RuntimeError):
    """The error that a thread raises because the process's main thread waits for something that will not come.

    Whoever owns the process ends it then, by `threading.excepthook`.
    """


class TookTooLong(Hangs):
    """The error of something that took many times longer than usual."""


class Watchdog:
    """Limits kinds of work, such as 'step' and 'checkpoint', to `factor` times the median of their last times.

    Work of one kind may contain work of another; the time of the inner does not count for the outer.
    """

    def __init__(self, *, factor: float, least_seconds: float, grace_seconds: float = GRACE_SECONDS) -> None:
        """
        Args:
            factor: 0: there is no limit.
            least_seconds: no limit is shorter.
        """
        self._factor = factor
        self._least_seconds = least_seconds
        self._grace_seconds = grace_seconds
        self._times: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._working: list[_Work] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._next_look = 0.0
        """The time at which the thread should look at the clock."""

    @contextmanager
    def watch(self, kind: str, name: str | None = None) -> Iterator[None]:
        """Watches the block. Its time counts for later limits, unless an exception ends it.

        Args:
            name: this piece of work in messages; None: its kind.
        """
        work = _Work(name or kind, self._limit(kind))
        self._change(work)
        try:
            yield
        finally:
            self._change(None)
        self._times[kind].append(work.seconds)

    def _limit(self, kind: str) -> _Limit | None:
        times = self._times[kind]
        if not self._factor or len(times) < KNOWN:
            return None
        median = statistics.median(times)
        return _Limit(max(self._factor * median, self._least_seconds), median)

    def _change(self, begins: _Work | None) -> None:
        """Stops the clock of the innermost work, and starts that of the one that begins or that goes on."""
        now = time.monotonic()
        with self._changed:
            if self._working:
                self._working[-1].stop(now)
            if begins is not None:
                self._working.append(begins)
            else:
                self._working.pop()
            if self._working:
                self._working[-1].start(now)
            self._arm(now)
            self._next_look = now
            self._changed.notify()

    def _arm(self, now: float) -> None:
        left = self._working[-1].left(now) if self._working else None
        if left is None:
            faulthandler.cancel_dump_traceback_later()
            return
        self._arm_faulthandler(left)
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="watchdog", daemon=True)
            self._thread.start()

    def _arm_faulthandler(self, left: float) -> None:
        faulthandler.dump_traceback_later(max(left, 0.0) + self._grace_seconds + LOCKED_SECONDS, exit=True)

    def _wait(self) -> None:
        with self._changed:
            while True:
                work, now = self._working[-1] if self._working else None, time.monotonic()
                if work is not None and now - self._next_look > TICK_SECONDS:
                    work.forgive(now - self._next_look)
                left = work.left(now) if work is not None else None
                if work is None or left is None:
                    self._changed.wait()
                elif left > 0:
                    self._arm_faulthandler(left)
                    self._next_look = now + min(left, TICK_SECONDS)
                    self._changed.wait(min(left, TICK_SECONDS))
                else:
                    self._show_stacks(work)

    def _show_stacks(self, work: _Work) -> None:
        message = work.message()
        print(f"--- {message}; all threads of this process:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        if not self._changed.wait_for(lambda: not self._is_current(work), self._grace_seconds):
            raise TookTooLong(message)
        print(f"--- {work.name} went on", file=sys.stderr, flush=True)

    def _is_current(self, work: _Work) -> bool:
        return bool(self._working) and self._working[-1] is work


class _Limit:
    def __init__(self, seconds: float, median: float) -> None:
        self.seconds = seconds
        self.median = median


class _Work:
    """A piece of work, and the time that it has taken so far."""

    def __init__(self, name: str, limit: _Limit | None) -> None:
        self.name = name
        self.seconds = 0.0
        self._limit = limit
        self._since = 0.0

    def start(self, now: float) -> None:
        self._since = now

    def stop(self, now: float) -> None:
        self.seconds += now - self._since

    def forgive(self, seconds: float) -> None:
        self._since += seconds

    def left(self, now: float) -> float | None:
        """Returns the seconds until the limit, while the clock runs; None: there is no limit."""
        return None if self._limit is None else self._limit.seconds - self.seconds - (now - self._since)

    def message(self) -> str:
        assert self._limit is not None
        return (
            f"{self.name} takes longer than {self._limit.seconds:.0f} seconds, and the median so far is "
            f"{self._limit.median:.0f} (trainer.watchdog)"
        )
