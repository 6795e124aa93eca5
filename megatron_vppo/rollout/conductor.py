"""Sampling with all engines at once: rank 0 hands out prompts as engines have room, and gets responses as they end.

    rank 0                                    leader of another engine
      hand out  ---- requests ------------->    ask the engine
      take      <--- responses, one by one --   take what has ended
      grade     meanwhile, in other processes
      decided   ---- end ------------------>    drop the rest, or
      keep      <--- the rest --------------    give it back

Rank 0 leads an engine itself, as a rule. Messages go through mailboxes (mailbox.py). Ranks without an engine wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any, Protocol

from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.mailbox import Inbox, Mailbox
from megatron_vppo.rollout.records import Ask, Completion, Sampled, SampleRequest, SamplingSettings
from megatron_vppo.system.stop_signals import StopRequested

PAUSE_SECONDS = 0.02
"""The time between two looks into the mailboxes."""
MOST_PER_MESSAGE = 16
"""Requests in a message, which has at most 8 MiB; each has the tokens of a prompt, without those of its images."""

Requests = Mapping[int, SampleRequest]
Source = Any
"""An object with a `fileno`, which is readable when there is something to take."""
END, CUT, LOST = "end", "cut", "lost"
"""Messages. To a leader: sampling has ended, or the run ends. From one: its engine has ended; the run ends; its engine
samples no more."""


class Judge(Protocol):
    """Grades what has been sampled."""

    def sampled(self, number: int, sample: int, completion: Completion) -> None:
        """Takes a response to grade. One that it has already is left alone.

        Args:
            sample: the place among those that were asked for.
        """

    def left(self, number: int, sample: int, completion: Completion) -> None:
        """Takes a response that came too late to be graded, or is unfinished."""

    def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
        """Returns the groups that have been graded since the last call, and whether they are kept.

        Args:
            idle: True if no engine has anything to do.
        """

    def sources(self) -> Sequence[Source]:
        """Returns what becomes readable when there are verdicts."""


class EngineLink(Protocol):
    """One engine, as rank 0 sees it while it samples."""

    def ask(self, asks: Mapping[int, Ask]) -> None: ...

    def take(self) -> list[Sampled]:
        """Returns what has ended. Raises EngineLost, and StopRequested if the engine's leader is to stop."""

    def source(self) -> Source | None:
        """Returns what becomes readable when there is something to take; None: look again after a pause."""

    def end(self) -> None:
        """Says that sampling has ended; `left` follows until it returns something."""

    def left(self) -> list[Sampled] | None:
        """Returns what came too late or is unfinished once the engine has ended; None: not yet.

        Raises as `take` does.
        """

    def cut(self) -> None:
        """Ends the sampling of an engine that will not be used again."""


@dataclass(frozen=True)
class Work:
    """One draw, with all that it takes to sample and grade it."""

    draw: Draw
    ask: Callable[[int], Ask]
    """Returns a prompt of the draw, by its number, with its seeds."""
    judge: Judge


class Conductor:
    """Rank 0's part."""

    def __init__(self, work: Work, *, stop_wanted: Callable[[], bool]) -> None:
        """`stop_wanted`: returns True if sampling is to be cut off."""
        self._draw, self._ask, self._judge = work.draw, work.ask, work.judge
        self._stop_wanted = stop_wanted
        self.idle_seconds = 0.0
        """The time in which engines had nothing to do: only grading was left."""

    @property
    def is_done(self) -> bool:
        """True if it is decided which groups count."""
        return self._draw.is_decided

    def run(
        self,
        links: Mapping[int, EngineLink],
        *,
        capacity: int,
        look: Callable[[], None],
        pause: Callable[[Sequence[Source]], object] = lambda sources: wait(sources, PAUSE_SECONDS),
    ) -> dict[int, EngineLost]:
        """Returns when it is decided which groups count, or all engines are lost. Returns the errors of lost engines.

        Args:
            links: the engines, by their numbers, in the order in which they are asked; all of them work.
            capacity: the responses that an engine can have in flight.
            look: gets what engines of other ranks have sent.
            pause: waits until one of the sources is readable, but not long.

        Raises StopRequested if sampling is to be cut off.
        """
        working, lost = dict(links), dict[int, EngineLost]()
        self._draw.open_to(sorted(working), capacity=capacity)
        try:
            while working and not self._draw.is_decided:
                if self._stop_wanted():
                    raise StopRequested
                began, idle = time.perf_counter(), self._draw.is_idle
                look()
                for number, error in self._turn(working):
                    lost[number] = error
                    del working[number]
                    self._draw.lost(number)
                if not self._judged():
                    pause([*filter(None, (link.source() for link in working.values())), *self._judge.sources()])
                self.idle_seconds += (time.perf_counter() - began) * idle
        except BaseException:
            for link in working.values():
                link.cut()
            raise
        return lost | self._end(working, look=look, pause=pause)

    def _end(
        self,
        working: Mapping[int, EngineLink],
        *,
        look: Callable[[], None],
        pause: Callable[[Sequence[Source]], object],
    ) -> dict[int, EngineLost]:
        """Ends sampling on all engines, and takes what they leave. Returns the errors of engines that are then lost."""
        lost: dict[int, EngineLost] = {}
        for link in working.values():
            link.end()
        ending = dict(working)
        while ending:
            look()
            for number, link in list(ending.items()):
                try:
                    left = link.left()
                except EngineLost as error:
                    left, lost[number] = [], error
                if left is None:
                    continue
                del ending[number]
                for one in left:
                    self._judge.left(one.number, one.sample, one.completion)
            if ending:
                pause([])
        return lost

    def _turn(self, working: Mapping[int, EngineLink]) -> Iterator[tuple[int, EngineLost]]:
        """Hands out prompts, and takes responses. Yields the engines that are lost."""
        given = self._draw.hand_out()
        for engine, link in list(working.items()):
            try:
                if engine in given:
                    link.ask({number: self._ask(number) for number in given[engine]})
                for one in link.take():
                    self._draw.ended(one.number)
                    self._judge.sampled(one.number, one.sample, one.completion)
            except EngineLost as error:
                yield engine, error

    def _judged(self) -> bool:
        """Takes the verdicts that there are. Returns True if there were some."""
        verdicts = self._judge.verdicts(idle=self._draw.is_idle)
        for number, kept in verdicts:
            self._draw.judged(number, kept=kept)
        return bool(verdicts)


class OwnEngine:
    """The engine that rank 0 leads."""

    def __init__(
        self, engine: RolloutEngine, settings: SamplingSettings, requests: Callable[[Mapping[int, Ask]], Requests]
    ) -> None:
        """`requests`: makes what the engine is asked, which holds the images."""
        self._engine, self._settings, self._requests = engine, settings, requests
        self._begun = False

    def ask(self, asks: Mapping[int, Ask]) -> None:
        if not self._begun:
            self._engine.begin_sampling(self._settings)
            self._begun = True
        self._engine.ask(self._requests(asks))

    def take(self) -> list[Sampled]:
        return self._engine.take() if self._begun else []

    def source(self) -> Source | None:
        return self._engine if self._begun else None

    def end(self) -> None:
        """Does nothing: `left` ends it, when the other engines have heard."""

    def left(self) -> list[Sampled]:
        return self._engine.end_sampling() if self._begun else []

    def cut(self) -> None:
        """Does nothing: an engine that is cut off is closed."""


class FarEngine:
    """An engine that another rank leads."""

    def __init__(self, number: int, to_leader: Mailbox, inbox: Inbox) -> None:
        self._number, self._to_leader, self._inbox = number, to_leader, inbox
        self._left: list[Sampled] = []

    def ask(self, asks: Mapping[int, Ask]) -> None:
        # The leader needs what the engine reads: a placeholder for each image, not its many tokens.
        items = [(number, replace(one, prompt=replace(one.prompt, token_ids=()))) for number, one in asks.items()]
        begun = [item for item in items if any(item[1].begun)]
        new = [item for item in items if not any(item[1].begun)]
        for start in range(0, len(new), MOST_PER_MESSAGE):
            self._to_leader.post(dict(new[start : start + MOST_PER_MESSAGE]))
        for item in begun:  # with tokens of all of its responses
            self._to_leader.post(dict([item]))

    def take(self) -> list[Sampled]:
        return self._messages()

    def left(self) -> list[Sampled] | None:
        messages = self._messages()
        self._left += [message for message in messages if message != END]
        return self._left if END in messages else None

    def _messages(self) -> list[Any]:
        messages = self._inbox.take(self._number)
        if CUT in messages:
            raise StopRequested
        if LOST in messages:
            raise EngineLost("the engine of another rank is lost", log_end="that rank has its log")
        return messages

    def source(self) -> None:
        return None

    def end(self) -> None:
        self._to_leader.post(END)

    def cut(self) -> None:
        self._to_leader.post(CUT)


def lead(
    number: int,
    engine: RolloutEngine,
    settings: SamplingSettings,
    from_rank_zero: Mailbox,
    to_rank_zero: Mailbox,
    *,
    requests: Callable[[Mapping[int, Ask]], Requests],
    stop_wanted: Callable[[], bool],
) -> None:
    """Lets this rank's engine sample what rank 0 hands out, until that says that it is enough.

    Raises:
        EngineLost: the engine is lost; rank 0 knows.
        StopRequested: the run is to end; rank 0 knows.
    """
    try:
        engine.begin_sampling(settings)
        while True:
            for message in from_rank_zero.take():
                if message == CUT:
                    raise StopRequested
                if message == END:
                    for one in engine.end_sampling():
                        to_rank_zero.post((number, one))
                    return to_rank_zero.post((number, END))
                engine.ask(requests(message))
            for one in engine.take(PAUSE_SECONDS):
                to_rank_zero.post((number, one))
            if stop_wanted():
                raise StopRequested
    except StopRequested:
        to_rank_zero.post((number, CUT))
        raise
    except BaseException:  # the others find out at the end of sampling
        to_rank_zero.post((number, LOST))
        raise
