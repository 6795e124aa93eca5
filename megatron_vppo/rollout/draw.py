"""The prompts of one step in the order in which they are drawn: which engine samples them, and whose groups count.

One draw takes the place of rounds. It is as large as the keep rate so far lets one expect to need, and grows where
fewer groups are kept than that. Engines get prompts from its front, the engine with the fewest responses in flight
first, and no engine more than it can have in flight.

    0   1   2   3   4   5   6   7   8   9  10  11      numbers; 3 groups are wanted
    k   -   k   k   ?   -   k   .   .   .              k: kept, -: dropped, ?: not graded yet, .: in flight

With the order 'draw' the first three kept groups of the draw count: 0, 2, 3. They are known here, so sampling ends. If
four were wanted, 4 would be waited for, although 6 is kept as well. So prompts, seeds and responses decide which groups
count, and never the time that something takes. With 'arrival' those count that were graded first.

Where the next step goes on with what this one does not need (carry.py), engines that have room begin prompts behind
those: at most as many as had to wait for room, of the prompts that a step is expected to need. Where all are sampled at
once, the longest response decides the time, and to begin more would only make their tokens older.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_vppo.config.choices import SampleOrder

MARGIN = 1.1
"""Prompts that are drawn over those that are expected to give the groups that are wanted."""
OPTIMISM = 1 / 8
"""The weight of a keep rate of one where none is known, in prompts per group that is wanted."""


class Draw:
    """The state of one draw, on rank 0. Engines have numbers, and so have prompts, from 0 in the order of the draw."""

    def __init__(
        self,
        *,
        wanted: int,
        most: int,
        responses: int,
        order: SampleOrder,
        seen: tuple[float, float] = (0.0, 0.0),
        missing: Sequence[int] = (),
        ahead: bool = False,
    ) -> None:
        """
        Args:
            wanted: groups that are wanted.
            most: prompts that may be sampled, at least `wanted`; with as many, all of them are, and at once.
            responses: to each prompt.
            seen: groups that were kept, and sampled, in the steps before; they weigh as much as those of this step.
            missing: of the first prompts, whose groups are carried, the responses that are still to be sampled.
            ahead: begin prompts that this step does not need, where engines have room.
        """
        self._wanted, self._most, self._responses, self._order = wanted, most, responses, order
        self._missing, self._ahead = missing, ahead
        self._kept_before, self._sampled_before = seen if seen[1] else (wanted * OPTIMISM, wanted * OPTIMISM)
        self._size = len(missing)
        self._waiting = [number for number in range(self._size) if missing[number]]
        """Numbers to hand out, in rising order."""
        self._left: dict[int, int] = {}
        """The responses that are still to come of each prompt that an engine has."""
        self._engine_of: dict[int, int] = {}
        self._in_flight: dict[int, int] = {}
        """Responses, by the number of the engine; the engines that can be given prompts."""
        self._capacity = 0
        self._verdicts: dict[int, bool] = {}
        """True for a group that is kept; in the order in which groups were graded."""
        self._kept = 0
        self._settled = 0
        """The prompts at the front of the draw that are graded, without a gap."""
        self._first_kept: list[int] = []
        """The groups of the settled prompts that are kept, at most as many as are wanted."""
        self._grow()

    # --- Handing out --------------------------------------------------------------------------------------------------

    def open_to(self, engines: Sequence[int], *, capacity: int) -> None:
        """Says which engines take prompts from now on; none of them has any yet.

        Args:
            capacity: the responses that one of them can have in flight.
        """
        self._in_flight = dict.fromkeys(engines, 0)
        self._capacity = capacity
        self._grow()

    def hand_out(self) -> dict[int, list[int]]:
        """Returns the prompts that engines are to sample now, by the number of the engine."""
        given: dict[int, list[int]] = {}
        while self._has_more:
            engine = min(self._in_flight, key=self._in_flight.__getitem__, default=None)
            if engine is None or self._in_flight[engine] >= self._capacity:
                break
            number = self._waiting.pop(0)
            self._in_flight[engine] += self._missing_of(number)
            self._engine_of[number], self._left[number] = engine, self._missing_of(number)
            given.setdefault(engine, []).append(number)
        return given

    def ended(self, number: int) -> None:
        """Notes that a response to a prompt has come."""
        self._in_flight[self._engine_of[number]] -= 1
        self._left[number] -= 1
        if self._left[number] == 0:
            del self._left[number]

    def lost(self, engine: int) -> list[int]:
        """Takes back what a lost engine has not finished. Returns the prompts, which are handed out again."""
        del self._in_flight[engine]
        back = [number for number in self._left if self._engine_of[number] == engine]
        for number in back:
            del self._left[number]
        self._waiting = sorted([*back, *self._waiting])
        return back

    @property
    def is_idle(self) -> bool:
        """True if no engine has anything to do."""
        return not self._left and not self._has_more

    # --- Deciding -----------------------------------------------------------------------------------------------------

    def judged(self, number: int, *, kept: bool) -> None:
        """Notes that a group is graded, and whether it is kept."""
        self._verdicts[number] = kept
        self._kept += kept
        while self._settled in self._verdicts and len(self._first_kept) < self._wanted:
            if self._verdicts[self._settled]:
                self._first_kept.append(self._settled)
            self._settled += 1
        self._grow()

    @property
    def is_decided(self) -> bool:
        """True if it is known which groups count."""
        enough = len(self._first_kept) if self._order == "draw" else self._kept
        return enough >= self._wanted or len(self._verdicts) >= self._most

    @property
    def chosen(self) -> list[int]:
        """The groups that count, in the order of the draw; known when it is decided."""
        if self._order == "draw":
            return self._first_kept
        return sorted([number for number, kept in self._verdicts.items() if kept][: self._wanted])

    @property
    def needed(self) -> list[int]:
        """The groups that decided which count, in the order of the draw: with 'arrival' all that are graded."""
        return list(range(self._settled)) if self._order == "draw" else sorted(self._verdicts)

    @property
    def used(self) -> int:
        """The prompts at the front of the draw that are not drawn again: with 'arrival' all that engines were given."""
        return self._settled if self._order == "draw" else self.reached

    @property
    def reached(self) -> int:
        """The prompts at the front of the draw up to the last one that an engine was given."""
        return max(self._engine_of, default=-1) + 1

    @property
    def given(self) -> int:
        """The prompts that engines were given."""
        return len(self._engine_of)

    @property
    def size(self) -> int:
        """The prompts of the draw so far."""
        return self._size

    @property
    def _has_more(self) -> bool:
        """True if there are prompts to hand out."""
        return bool(self._waiting) and (self._ahead or self._waiting[0] < self._end)

    @property
    def _end(self) -> int:
        """The prompts at the front of the draw among which all are that can count."""
        if self._kept < self._wanted:
            return self._size
        kept = sorted(number for number, kept in self._verdicts.items() if kept)
        return kept[self._wanted - 1] + 1 if kept else 0

    def _grow(self) -> None:
        """Draws more prompts where those that are not graded yet will probably not be enough."""
        missing = self._wanted - self._kept
        if missing <= 0 or self._size >= self._most:
            return
        rate = (self._kept_before + self._kept) / (self._sampled_before + len(self._verdicts))
        size = max(self._size, self._expected(missing, rate)) if rate else self._most
        size = min(self._most, size)
        self._waiting += [number for number in range(self._size, size) if self._missing_of(number)]
        self._size = size

    def _expected(self, missing: int, rate: float) -> int:
        """Returns the size of a draw that will probably be enough, and of which as much is begun ahead as may be."""
        size = len(self._verdicts) + math.ceil(MARGIN * missing / rate)
        if self._ahead and self._in_flight:
            at_once = len(self._in_flight) * math.ceil(self._capacity / self._responses)
            size = max(size, math.ceil(2 * self._wanted / rate) - at_once)
        return size

    def _missing_of(self, number: int) -> int:
        return self._missing[number] if number < len(self._missing) else self._responses
