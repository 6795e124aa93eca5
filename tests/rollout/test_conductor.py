"""Rank 0 and the leaders of engines, in one process: what they tell each other when something goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.rollout import conductor
from megatron_vppo.rollout.child import EngineLost
from megatron_vppo.rollout.conductor import CUT, END, LOST, Conductor, FarEngine, OwnEngine, Work, lead
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.mailbox import Inbox, Mailbox
from megatron_vppo.rollout.records import UNFINISHED, Ask, Sampled, SampleRequest, SamplingSettings
from megatron_vppo.rollout.sharing import SampledGroups
from megatron_vppo.system.stop_signals import StopRequested
from tests.rollout.stand_in import StandIn

SETTINGS = SamplingSettings(max_tokens=3)
SIZE = 2


def prompt(number: int) -> Prompt:
    return Prompt("train", number, "q", "a", (1, number), (1, number), (), ())


def ask(number: int) -> Ask:
    return Ask(prompt(number), (10 * number, 10 * number + 1))


def requests(asks: Any) -> dict[int, SampleRequest]:
    return {
        number: SampleRequest(one.prompt.compact_token_ids, (), one.seeds, one.begun) for number, one in asks.items()
    }


class Line:
    """The two mailboxes between rank 0 and a leader, from both ends."""

    def __init__(self) -> None:
        store = dist.HashStore()
        self.to, self.back = Mailbox(store, "to"), Mailbox(store, "back")
        self.far_to, self.far_back = Mailbox(store, "to"), Mailbox(store, "back")
        self.inbox = Inbox(self.back)
        self.link = FarEngine(5, self.to, self.inbox)

    def lead(self, engine: StandIn, *, stop_wanted: bool = False) -> None:
        made: Any = engine
        lead(5, made, SETTINGS, self.far_to, self.far_back, requests=requests, stop_wanted=lambda: stop_wanted)


def own(engine: StandIn) -> OwnEngine:
    made: Any = engine
    return OwnEngine(made, SETTINGS, requests)


def work(count: int, judge: SampledGroups | None = None) -> tuple[Work, SampledGroups]:
    groups = judge or SampledGroups(prompt, size=SIZE)
    return Work(Draw(wanted=count, most=count, responses=SIZE, order="draw"), ask, groups), groups


def nothing() -> None:
    pass


def not_long(sources: Sequence[Any]) -> None:
    pass


def test_a_message_to_a_leader_leaves_out_what_only_the_trainer_reads() -> None:
    """A prompt with 100,000 image tokens takes no more of the 8 MiB of a message than one without."""
    line = Line()
    long = Prompt("train", 3, "q", "a", (7,) * 100_000, (1, 7, 2), (), ())
    line.link.ask({4: Ask(long, (10, 11))})
    ((number, sent),) = line.far_to.take()[0].items()
    assert (number, sent.seeds, sent.prompt.compact_token_ids, sent.prompt.row) == (4, (10, 11), (1, 7, 2), 3)
    assert sent.prompt.token_ids == ()


def test_what_has_begun_goes_in_messages_of_its_own() -> None:
    """Sixteen groups of eight responses of 16,000 tokens each would be more than a message takes."""
    line = Line()
    begun = {number: Ask(prompt(number), (1, 2), ((), (5,) * 16_000)) for number in (3, 4)}
    line.link.ask({**begun, 7: ask(7), 8: ask(8)})
    assert [list(message) for message in line.far_to.take()] == [[7, 8], [3], [4]]


def test_an_engine_of_another_rank_samples_what_is_handed_out() -> None:
    """150 prompts are ten messages; the other engine, of rank 0, gets as many."""
    line, near, far = Line(), StandIn(1, at_a_time=8), StandIn(2, at_a_time=8)
    leader = threading.Thread(target=line.lead, args=(far,))
    leader.start()
    task, groups = work(300)
    conducted = Conductor(task, stop_wanted=lambda: False)
    assert conducted.run({0: own(near), 1: line.link}, capacity=1000, look=line.inbox.look, pause=not_long) == {}
    leader.join(60)
    assert conducted.is_done and not (near.samples or far.samples)
    assert near.asked == [list(range(0, 300, 2))]
    assert [number for numbers in far.asked for number in numbers] == list(range(1, 300, 2))
    assert [len(numbers) for numbers in far.asked] == [16] * 9 + [6]
    for number in range(300):
        seeds = [tuple(response.token_ids)[1] for response in groups.responses(number)]
        assert seeds == [10 * number, 10 * number + 1]


def test_an_engine_without_work_need_not_begin() -> None:
    task, _ = work(1)
    idle = StandIn()
    Conductor(task, stop_wanted=lambda: False).run(
        {0: own(StandIn()), 1: own(idle)}, capacity=9, look=nothing, pause=not_long
    )
    assert idle.asked == []


def test_a_leader_says_why_it_samples_no_more() -> None:
    class Lost(StandIn):
        def take(self, seconds: float = 0.0) -> list[Sampled]:
            raise EngineLost("it died", log_end="the log")

    class Refusing(StandIn):
        def take(self, seconds: float = 0.0) -> list[Sampled]:
            raise RuntimeError("refused: too long")

    for engine, error in ((Lost(), EngineLost), (Refusing(), RuntimeError)):
        line = Line()
        with pytest.raises(error):
            line.lead(engine)
        assert line.back.take() == [(5, LOST)]
    line = Line()
    with pytest.raises(StopRequested):
        line.lead(StandIn(), stop_wanted=True)
    line.inbox.look()
    with pytest.raises(StopRequested):
        line.link.take()
    line = Line()
    line.link.cut()
    with pytest.raises(StopRequested):
        line.lead(StandIn())


def test_all_engines_are_told_that_the_run_ends() -> None:
    class Failing(SampledGroups):
        def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
            raise ValueError("all rewards failed")

    task, _ = work(4, Failing(prompt, size=SIZE))
    lines = [Line(), Line()]
    with pytest.raises(ValueError, match="all rewards failed"):
        Conductor(task, stop_wanted=lambda: False).run(
            {number: line.link for number, line in enumerate(lines)}, capacity=9, look=nothing, pause=not_long
        )
    assert [line.far_to.take()[-1] for line in lines] == [CUT, CUT]
    task, _ = work(4)
    with pytest.raises(StopRequested):
        Conductor(task, stop_wanted=lambda: True).run({0: lines[0].link}, capacity=9, look=nothing, pause=not_long)
    assert lines[0].far_to.take() == [CUT]


def test_the_last_engine_that_is_lost_ends_the_sampling() -> None:
    line = Line()
    task, _ = work(4)
    line.far_back.post((5, LOST))
    conducted = Conductor(task, stop_wanted=lambda: False)
    assert set(conducted.run({3: line.link}, capacity=9, look=line.inbox.look, pause=not_long)) == {3}
    assert not conducted.is_done and END not in line.far_to.take()


def test_an_engine_that_is_lost_when_it_should_end_is_known() -> None:
    class Lost(StandIn):
        def end_sampling(self) -> list[Sampled]:
            raise EngineLost("it died", log_end="the log")

    task, _ = work(2)
    conducted = Conductor(task, stop_wanted=lambda: False)
    lost = conducted.run({0: own(Lost()), 1: own(StandIn())}, capacity=9, look=nothing, pause=not_long)
    assert set(lost) == {0} and conducted.is_done


def test_what_is_unfinished_comes_back_from_every_engine() -> None:
    """Two groups are wanted. Both engines have begun two more each when those are there."""
    settings = replace(SETTINGS, keeps_unfinished=True)
    line, near, far = Line(), StandIn(1, at_a_time=1), StandIn(2, at_a_time=1)
    made: Any = far
    leader = threading.Thread(
        target=lead, args=(5, made, settings, line.far_to, line.far_back),
        kwargs={"requests": requests, "stop_wanted": lambda: False},
    )  # fmt: skip
    leader.start()
    groups = SampledGroups(prompt, size=SIZE)
    draw = Draw(wanted=2, most=9, responses=SIZE, order="arrival", seen=(1, 2.5))
    made = near
    links: dict[int, Any] = {0: OwnEngine(made, settings, requests), 1: line.link}
    conducted = Conductor(Work(draw, ask, groups), stop_wanted=lambda: False)
    assert conducted.run(links, capacity=6, look=line.inbox.look, pause=not_long) == {}
    leader.join(60)
    assert not leader.is_alive() and not (near.samples or far.samples) and draw.given == 6
    ended = [one for number in range(6) for one in groups.begun(number).values() if one.finish_reason == "stop"]
    left = [one for number in range(6) for one in groups.begun(number).values() if one.finish_reason == UNFINISHED]
    assert len(ended) + len(left) == 12 and len(ended) >= 4 and left
    for one in left:
        assert (list(one.token_ids), list(one.rollout_logps)) == ([one.group_id], [-1.0])


def test_time_counts_as_idle_when_only_grading_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn but the last takes a second. The engine gives its responses in the first two, and then waits."""

    class Slow(SampledGroups):
        left = 3

        def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
            self.left -= idle
            return super().verdicts(idle=idle) if self.left == 0 else []

    clock = [0.0]

    def pause(sources: Sequence[Any]) -> None:
        clock[0] += 1

    monkeypatch.setattr(conductor, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    task, _ = work(1, Slow(prompt, size=SIZE))
    conducted = Conductor(task, stop_wanted=lambda: False)
    conducted.run({0: own(StandIn(at_a_time=1))}, capacity=9, look=nothing, pause=pause)
    assert (clock[0], conducted.idle_seconds) == (3.0, 1.0)
