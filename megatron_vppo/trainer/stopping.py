"""The end of a run before its last step: on request, or because the job's time is nearly over.

All ranks ask at the same boundaries of a step and get the same answer. What a boundary leaves out is done again after
the restart, from the same prompts and seeds:

    sampling      engines and graders are cut off, and the step's responses are thrown away
    scoring       not begun, or left between two chunks of micro-batches (parallel/score_chunks.py)
    update        not begun, unless it is known to end in time
    validation    cut off; it is done first after the restart, and the step's line of metrics is written then
    next step     not begun, also if it is known not to end before the job's time does

What lies between two boundaries is finished: an update with all its mini-batches, since the weights between two of them
are of no step; the sync of weights after it; a checkpoint. Where one of them takes longer than
trainer.stop_within_seconds, that promise cannot be kept, and the user is told what to set.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Literal

from megatron_vppo.system.stop_signals import StopRequested, StopSignals

RECENT_STEPS = 5
"""The number of steps from which the duration of the next is foretold: the longest of them."""
TIME_LIMIT_MARGIN_SECONDS = 30.0
"""The time that is left over for the end of a run at its job's time limit: engines, logs, the requeue."""


Part = Literal["step", "update", "weight sync", "checkpoint"]

UNCUT: Mapping[Part, str] = MappingProxyType(
    {
        "update": "Lower data.rollout_batch_size, or raise",
        "weight sync": "Raise",
        "checkpoint": "Put trainer.runs_dir on faster storage, or raise",
    }
)
"""The parts that are finished once they have begun, with what a user can do about a long one."""
HIGHER = "trainer.stop_within_seconds, and the time before the job's limit (--grace-seconds of vppo slurm), above that"

Warn = Callable[[str], None]
"""Shows a line to the user."""


class Durations:
    """The seconds that parts of the last RECENT_STEPS steps took, on this rank."""

    def __init__(self, *, within: float = math.inf, warn: Warn | None = None) -> None:
        """
        Args:
            within: the time that a part of UNCUT may take; `warn` gets the first one of each kind that takes longer.
            warn: None: another rank does it.
        """
        self._seconds: dict[Part, deque[float]] = {}
        self._within = within
        self._warn = warn
        self._warned: set[Part] = set()

    @contextmanager
    def time(self, part: Part) -> Iterator[None]:
        """Counts the time of the block, if it ends without an exception."""
        began = time.monotonic()
        yield
        self.add(part, time.monotonic() - began)

    def add(self, part: Part, seconds: float) -> None:
        """Counts the seconds that a part took."""
        self._seconds.setdefault(part, deque(maxlen=RECENT_STEPS)).append(seconds)
        if self._warn is not None and seconds > self._within and part in UNCUT.keys() - self._warned:
            self._warned.add(part)
            self._warn(
                f"the {part} took {seconds:.0f} s, longer than trainer.stop_within_seconds={self._within:.0f}: if the "
                f"run is asked to stop meanwhile, it stops too late. {UNCUT[part]} {HIGHER}"
            )

    def longest(self, part: Part) -> float | None:
        """Returns the longest time that a part took; None if there was none yet."""
        return max(self._seconds[part]) if part in self._seconds else None


class Stopping:
    """Decides at the boundaries of a step whether the run ends there."""

    def __init__(
        self,
        signals: StopSignals | None,
        *,
        end_time: float | None,
        stop_within_seconds: float,
        any_rank: Callable[[bool], bool],
        warn: Warn | None = None,
    ) -> None:
        """
        Args:
            signals: of this process; None: nobody can ask.
            end_time: when the job's time is over, in seconds since 1970; None: never, or this rank does not know.
            stop_within_seconds: the time that may pass from a request to the boundary at which the run leaves its step.
            any_rank: returns True on every rank if it was given True on some; a collective.
            warn: says what takes longer than `stop_within_seconds`; None: another rank does.
        """
        self._signals = signals
        self._end_time = end_time
        self._within = stop_within_seconds
        self._any_rank = any_rank
        self._warn = warn
        self.durations = Durations(within=stop_within_seconds, warn=warn)
        self._too_long = ""

    @property
    def reason(self) -> str:
        """The reason of the stop, for the user; '' if this rank does not know it."""
        asked = self._signals.request if self._signals is not None else None
        return f"on request ({asked.name})" if asked is not None else self._too_long

    def wanted(self) -> bool:
        """Returns True if this rank was asked to stop; no collective."""
        return self._signals is not None and self._signals.request is not None

    def before_step(self) -> bool:
        """Returns True if the next step is not to begin; a collective."""
        return self._any_rank(self.wanted() or self._is_too_long())

    def at_scoring(self) -> None:
        """Raises StopRequested if the step is to end here, before scoring or in it; a collective."""
        self._leave_if(self.wanted())

    def before_update(self) -> None:
        """Raises StopRequested if the step is to end here; a collective.

        An update that is known to end in time is worth its sampling and scoring.
        """
        left = self._within - self._seconds_since_request
        update = self.durations.longest("update")
        self._leave_if(self.wanted() and (update is None or update > left))

    def seconds_left(self) -> float | None:
        """Returns the seconds until the job's time is over; None if this rank knows of no end."""
        return None if self._end_time is None else self._end_time - time.time()

    def leaving(self) -> None:
        """Says so if the run leaves its step later than it may."""
        if self._warn is not None and self._seconds_since_request > self._within:
            self._warn(
                f"the run was asked to stop {self._seconds_since_request:.0f} s ago, longer than "
                f"trainer.stop_within_seconds={self._within:.0f}, and only now leaves its step. Raise {HIGHER}"
            )

    @property
    def _seconds_since_request(self) -> float:
        return self._signals.seconds_since_request if self._signals is not None else 0.0

    def _leave_if(self, wish: bool) -> None:
        if self._any_rank(wish):
            raise StopRequested

    def _is_too_long(self) -> bool:
        """Returns True if a step as long as recent ones, with its checkpoint, would not end in the job's time."""
        left = self.seconds_left()
        step = self.durations.longest("step")
        if left is None or step is None:
            return False
        needed = step + (self.durations.longest("checkpoint") or 0.0) + TIME_LIMIT_MARGIN_SECONDS
        if needed <= left:
            return False
        self._too_long = f"because the job ends in {left:.0f} s, and a step with its checkpoint takes {needed:.0f} s"
        return True
