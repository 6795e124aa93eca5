"""The time that sampling takes, by a clock that is not real. The scheduling is; engines and graders stand for time.

The least time is that of the longest response, or that of all sampled tokens if engines were never idle. Lengths are
log-normal with a mean of 450 tokens, as in megatron_vppo/planning/sampling_seconds.py; 55 % of the groups are kept.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.config.choices import SampleOrder
from megatron_vppo.rollout.conductor import Conductor, Work
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.records import Ask, Completion, Sampled
from megatron_vppo.rollout.sharing import SampledGroups

WANTED, RESPONSES, ENGINES, RATE = 384, 8, 8, 0.55
TOKEN_SECONDS, GRADE_SECONDS, GRADERS = 0.01, 0.0015, 2
SEEN = (550.0, 1000.0)
"""Groups kept and sampled before."""
LEAST_TIME_BAR, SAMPLED_BAR, LAST_REWARD_SECONDS = 1.1, 1.15, 1.0
LIST_BAR = 1.01
"""The order 'draw', against handing out no response that is not needed, one by one, to whoever has room."""


@dataclass
class Clock:
    now: float = 0.0
    events: list[float] = field(default_factory=list)

    def at(self, seconds: float) -> float:
        heapq.heappush(self.events, seconds)
        return seconds

    def advance(self, sources: Sequence[Any]) -> None:
        """Goes to the next thing that happens."""
        assert self.events, "sampling waits for nothing"
        self.now = heapq.heappop(self.events)


@dataclass
class Engine:
    """Samples `slots` responses at once, each as fast as the others."""

    clock: Clock
    lengths: Mapping[tuple[int, int], int]
    slots: int
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    running: list[tuple[float, tuple[int, int]]] = field(default_factory=list)
    """A heap of the times at which responses end."""
    busy_until: list[tuple[float, float]] = field(default_factory=list)
    """The times at which each response began and ended."""

    def ask(self, asks: Mapping[int, Ask]) -> None:
        self.waiting += [(number, sample) for number in asks for sample in range(RESPONSES)]
        self._start()

    def _start(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            one = self.waiting.popleft()
            end = self.clock.at(self.clock.now + TOKEN_SECONDS * self.lengths[one])
            heapq.heappush(self.running, (end, one))
            self.busy_until.append((self.clock.now, end))

    def take(self) -> list[Sampled]:
        ended = []
        while self.running and self.running[0][0] <= self.clock.now:
            number, sample = heapq.heappop(self.running)[1]
            ended.append(Sampled(number, sample, Completion((), (), "stop", 0)))
        self._start()
        return ended

    def source(self) -> Any:
        return None

    def end(self) -> None:
        self.waiting.clear()

    def left(self) -> list[Sampled]:
        return []

    def cut(self) -> None:
        raise AssertionError("nothing is cut off")

    def sampled_seconds(self) -> float:
        return sum(min(end, self.clock.now) - begun for begun, end in self.busy_until)


class Judge(SampledGroups):
    """Grades responses in their order, with some workers."""

    def __init__(self, clock: Clock, kept: Sequence[bool]) -> None:
        super().__init__(lambda number: Prompt("train", number, "", "", (), (), (), ()), size=RESPONSES)
        self.clock, self.kept = clock, kept
        self.free = [0.0] * GRADERS
        self.ready: list[tuple[float, int]] = []
        self.done: dict[int, int] = {}
        self.last_response: dict[int, float] = {}

    def sampled(self, number: int, sample: int, response: Completion) -> None:
        self.last_response[number] = self.clock.now
        end = self.clock.at(max(self.clock.now, heapq.heappop(self.free)) + GRADE_SECONDS)
        heapq.heappush(self.free, end)
        heapq.heappush(self.ready, (end, number))

    def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
        whole = []
        while self.ready and self.ready[0][0] <= self.clock.now:
            number = heapq.heappop(self.ready)[1]
            self.done[number] = self.done.get(number, 0) + 1
            if self.done[number] == RESPONSES:
                whole.append((number, self.kept[number]))
        return whole


def list_seconds(seconds: Sequence[float], slots: int) -> float:
    """Returns the time that jobs take in this order if each begins as soon as one of the slots is free."""
    free = [0.0] * slots
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


@pytest.mark.parametrize("slots", [1024, 128, 64, 16], ids=["all at once", "in few waves", "in waves", "in many waves"])
@pytest.mark.parametrize("order", ["draw", "arrival"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_engines_are_never_idle_and_little_is_sampled_in_vain(seed: int, order: SampleOrder, slots: int) -> None:
    chance = random.Random(seed)
    most = 4 * WANTED
    kept = [chance.random() < RATE for _ in range(most)]
    lengths = {
        (number, sample): max(8, min(2048, round(chance.lognormvariate(5.929, 0.6))))
        for number in range(most)
        for sample in range(RESPONSES)
    }
    clock = Clock()
    engines = {number: Engine(clock, lengths, slots) for number in range(ENGINES)}
    judge = Judge(clock, kept)
    draw = Draw(wanted=WANTED, most=most, responses=RESPONSES, order=order, seen=SEEN)
    asks: dict[int, Ask] = {}

    def ask(number: int) -> Ask:
        return asks.setdefault(number, Ask(Prompt("train", number, "", "", (), (), (), ()), (None,) * RESPONSES))

    conductor = Conductor(Work(draw, ask, judge), stop_wanted=lambda: False)
    assert conductor.run(engines, capacity=slots, look=lambda: None, pause=clock.advance) == {}

    assert len(draw.chosen) == WANTED
    longest = max(lengths[number, sample] for number in draw.needed for sample in range(RESPONSES)) * TOKEN_SECONDS
    work = sum(engine.sampled_seconds() for engine in engines.values()) / (ENGINES * slots)
    if order == "draw":
        # If lengths are alike for all prompts and known only when they end, the order in which responses begin does not
        # change how this time is distributed, so that nothing is better on average (ADR 0027).
        in_order = [TOKEN_SECONDS * lengths[number, sample] for number in draw.needed for sample in range(RESPONSES)]
        assert clock.now <= LIST_BAR * list_seconds(in_order, ENGINES * slots)
    if slots in (1024, 16) or (order, slots) == ("arrival", 64):
        assert clock.now <= LEAST_TIME_BAR * max(longest, work)
    assert draw.given <= SAMPLED_BAR * WANTED / RATE
    assert clock.now - max(judge.last_response[number] for number in draw.needed) <= LAST_REWARD_SECONDS
