"""Engines and graders that stand for time, by a clock that is not real.

Lengths are log-normal with a mean of 450 tokens, as in megatron_vppo/planning/sampling_seconds.py; 55 % of the groups
are kept.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.rollout.records import UNFINISHED, Ask, Completion, Sampled
from megatron_vppo.rollout.sampling_loop import TOKENS_PER_PIECE

RESPONSES, RATE, MOST_TOKENS = 8, 0.55, 2048
TOKEN_SECONDS, GRADE_SECONDS, GRADERS = 0.01, 0.0015, 2

Lengths = Mapping[tuple[int, int], int]
"""Tokens of each response, by row and sample."""


def prompt(row: int) -> Prompt:
    return Prompt("train", row, "", "", (), (), (), ())


def draw_rows(seed: int, rows: int) -> tuple[list[bool], Lengths]:
    """Draws which groups are kept, and the lengths of all responses."""
    chance = random.Random(seed)
    kept = [chance.random() < RATE for _ in range(rows)]
    return kept, {
        (row, sample): max(8, min(MOST_TOKENS, round(chance.lognormvariate(5.929, 0.6))))
        for row in range(rows)
        for sample in range(RESPONSES)
    }


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
    lengths: Lengths
    slots: int
    samples: Callable[[int], Sequence[int]] = lambda number: range(RESPONSES)
    """Returns the samples that are asked for, by the number of a prompt."""
    waiting: deque[tuple[int, int, int]] = field(default_factory=deque)
    """Number, place and tokens that are still to be sampled."""
    running: list[tuple[float, int, int, int]] = field(default_factory=list)
    """A heap of the times at which responses end, with the same."""
    busy_until: list[tuple[float, float]] = field(default_factory=list)
    """The times at which each response began and ended."""
    returned: list[tuple[int, int]] = field(default_factory=list)
    """Numbers, with the tokens of each response that has come back."""

    def ask(self, asks: Mapping[int, Ask]) -> None:
        for number, one in asks.items():
            for place, sample in enumerate(self.samples(number)):
                begun = len(one.begun[place]) if one.begun else 0
                self.waiting.append((number, place, self.lengths[one.prompt.row, sample] - begun))
        self._start()

    def _start(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            number, place, tokens = self.waiting.popleft()
            end = self.clock.at(self.clock.now + TOKEN_SECONDS * tokens)
            heapq.heappush(self.running, (end, number, place, tokens))
            self.busy_until.append((self.clock.now, end))

    def take(self) -> list[Sampled]:
        ended = []
        while self.running and self.running[0][0] <= self.clock.now:
            _, number, place, tokens = heapq.heappop(self.running)
            ended.append(self._sampled(number, place, tokens, "stop"))
        self._start()
        return ended

    def _sampled(self, number: int, place: int, tokens: int, reason: str) -> Sampled:
        self.returned.append((number, tokens))
        return Sampled(number, place, Completion((0,) * tokens, (0.0,) * tokens, reason, 0))

    def source(self) -> Any:
        return None

    def end(self) -> None:
        pass

    def left(self) -> list[Sampled]:
        """Gives back what is unfinished, as far as it has been handed out in whole pieces (sampling_loop.py)."""
        left = [self._sampled(number, place, 0, UNFINISHED) for number, place, _ in self.waiting]
        for end, number, place, tokens in self.running:
            sampled = tokens - max(1, math.ceil((end - self.clock.now) / TOKEN_SECONDS))
            left.append(self._sampled(number, place, sampled // TOKENS_PER_PIECE * TOKENS_PER_PIECE, UNFINISHED))
        return left

    def cut(self) -> None:
        raise AssertionError("nothing is cut off")

    def sampled_seconds(self) -> float:
        return sum(min(end, self.clock.now) - begun for begun, end in self.busy_until)


class Graders:
    """Workers that grade responses in their order."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.free = [0.0] * GRADERS
        self.ready: list[tuple[float, int]] = []

    def submit(self, key: int) -> None:
        end = self.clock.at(max(self.clock.now, heapq.heappop(self.free)) + GRADE_SECONDS)
        heapq.heappush(self.free, end)
        heapq.heappush(self.ready, (end, key))

    def take(self) -> Iterator[int]:
        while self.ready and self.ready[0][0] <= self.clock.now:
            yield heapq.heappop(self.ready)[1]
