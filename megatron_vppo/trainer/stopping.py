"""The end of a run before its last step: on request, or because the job's time is nearly over.

All ranks ask at the same boundaries of a step and get the same answer. What a boundary leaves out is done again after
the restart, from the same prompts and seeds:

    sampling      engines are cut off, and the round's responses are thrown away
    scoring       not begun
    update        not begun, unless it is known to end in time; an update that has begun is finished
    validation    cut off; it is done first after the restart, and the step's line of metrics is written then
    next step     not begun, also if it is known not to end before the job's time does
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from megatron_vppo.system.stop_signals import StopRequested, StopSignals

RECENT_STEPS = 5
"""The number of steps from which the duration of the next is foretold: the longest of them."""
TIME_LIMIT_MARGIN_SECONDS = 30.0
"""The time that is left over for the end of a run at its job's time limit: engines, logs, the requeue."""


Part = Literal["step", "update", "checkpoint"]


class Durations:
    """The seconds that parts of the last RECENT_STEPS steps took, on this rank."""

    def __init__(self) -> None:
        self._seconds: dict[Part, deque[float]] = {}

    @contextmanager
    def time(self, part: Part) -> Iterator[None]:
        """Counts the time of the block, if it ends without an exception."""
        began = time.monotonic()
        yield
        self._seconds.setdefault(part, deque(maxlen=RECENT_STEPS)).append(time.monotonic() - began)

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
    ) -> None:
        """
        Args:
            signals: of this process; None: nobody can ask.
            end_time: when the job's time is over, in seconds since 1970; None: never, or this rank does not know.
            stop_within_seconds: the time that may pass from a request to the checkpoint.
            any_rank: returns True on every rank if it was given True on some; a collective.
        """
        self._signals = signals
        self._end_time = end_time
        self._within = stop_within_seconds
        self._any_rank = any_rank
        self.durations = Durations()
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

    def before_scoring(self) -> None:
        """Raises StopRequested if the step is to end here; a collective."""
        self._leave_if(self.wanted())

    def before_update(self) -> None:
        """Raises StopRequested if the step is to end here; a collective.

        An update that is known to end in time is worth its sampling and scoring.
        """
        left = self._within - (self._signals.seconds_since_request if self._signals else 0.0)
        update = self.durations.longest("update")
        self._leave_if(self.wanted() and (update is None or update > left))

    def seconds_left(self) -> float | None:
        """Returns the seconds until the job's time is over; None if this rank knows of no end."""
        return None if self._end_time is None else self._end_time - time.time()

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
