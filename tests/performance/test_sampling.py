"""The time that sampling takes, by a clock that is not real. The scheduling is; engines and graders stand for time.

The least time is that of the longest response, or that of all sampled tokens if engines were never idle.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vppo.algorithm.types import Prompt, Response, Reward
from megatron_vppo.config.choices import SampleOrder
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.prompt_sets import PromptSets
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.rollout.carry import Carry
from megatron_vppo.rollout.conductor import Conductor, Work
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.records import Ask, Completion, SamplingSettings
from megatron_vppo.rollout.sharing import SampledGroups
from megatron_vppo.trainer.collect import Collector
from megatron_vppo.trainer.format_share import FormatShare
from megatron_vppo.trainer.grader import Grader
from megatron_vppo.trainer.keep_rate import KeepRate
from tests.performance.virtual_time import (
    MOST_TOKENS,
    RATE,
    RESPONSES,
    TOKEN_SECONDS,
    Clock,
    Engine,
    Graders,
    Lengths,
    draw_rows,
    prompt,
)

WANTED, ENGINES = 384, 8
SEEN = (550.0, 1000.0)
"""Groups kept and sampled before."""
LEAST_TIME_BAR, SAMPLED_BAR, LAST_REWARD_SECONDS = 1.1, 1.15, 1.0
LIST_BAR = 1.01
"""The order 'draw', against handing out no response that is not needed, one by one, to whoever has room."""


class Judge(SampledGroups):
    """Keeps the groups that a script says."""

    def __init__(self, clock: Clock, kept: Sequence[bool]) -> None:
        super().__init__(prompt, size=RESPONSES)
        self.clock, self.kept, self.graders = clock, kept, Graders(clock)
        self.done: dict[int, int] = {}
        self.last_response: dict[int, float] = {}

    def sampled(self, number: int, sample: int, response: Completion) -> None:
        self.last_response[number] = self.clock.now
        self.graders.submit(number)

    def verdicts(self, *, idle: bool) -> list[tuple[int, bool]]:
        whole = []
        for number in self.graders.take():
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
    most = 4 * WANTED
    kept, lengths = draw_rows(seed, most)
    clock = Clock()
    engines = {number: Engine(clock, lengths, slots) for number in range(ENGINES)}
    judge = Judge(clock, kept)
    draw = Draw(wanted=WANTED, most=most, responses=RESPONSES, order=order, seen=SEEN)
    asks: dict[int, Ask] = {}

    def ask(number: int) -> Ask:
        return asks.setdefault(number, Ask(prompt(number), (None,) * RESPONSES))

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


# --- Steps that carry groups ------------------------------------------------------------------------------------------

STEPS, FEW_WANTED, FEW_ENGINES = 6, 96, 2
"""A quarter of the prompts and engines, so that the waves are those of above."""


class Rows:
    """Stands for a PromptSet."""

    dataset: Any = None
    split = "train"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Prompt:
        return prompt(row)


class Pool:
    """Stands for the reward workers: sample 0 of a group that is kept is right, and nothing else."""

    grades_batches = False

    def __init__(self, kept: Sequence[bool]) -> None:
        self.kept, self.clock = kept, Clock()

    def forget(self) -> None:
        self.graders, self.submitted = Graders(self.clock), list[Response]()

    def submit(self, responses: Sequence[Response]) -> list[int]:
        tickets = range(len(self.submitted), len(self.submitted) + len(responses))
        self.submitted += responses
        for ticket in tickets:
            self.graders.submit(ticket)
        return list(tickets)

    def take(self) -> dict[int, tuple[str, Reward]]:
        return {ticket: ("", self._reward(self.submitted[ticket])) for ticket in self.graders.take()}

    def _reward(self, one: Response) -> Reward:
        right = float(one.sample == 0 and self.kept[one.prompt.row])
        return Reward(right, right, {})

    def sources(self) -> list[Any]:
        return []


class Sampler:
    """Stands for EngineSampler: lets the conductor run on a clock that begins with each step."""

    def __init__(self, pool: Pool, carry: Carry, lengths: Lengths, slots: int) -> None:
        self.pool, self.carry, self.lengths, self.slots = pool, carry, lengths, slots
        self.ratios: list[float] = []
        """The time of each step over the least one, see the module's docstring."""

    def sample(self, work: Callable[[], Work], settings: SamplingSettings) -> float:
        clock = self.pool.clock = Clock()
        mine, carried = work(), self.carry.groups
        engines = {
            engine: Engine(
                clock, self.lengths, self.slots,
                lambda number: carried[number].missing if number < len(carried) else range(RESPONSES),
            )
            for engine in range(FEW_ENGINES)
        }  # fmt: skip
        conductor = Conductor(mine, stop_wanted=lambda: False)
        assert conductor.run(engines, capacity=self.slots, look=lambda: None, pause=clock.advance) == {}
        returned = [one for engine in engines.values() for one in engine.returned]
        needed = set(mine.draw.needed)
        longest = max(tokens for number, tokens in returned if number in needed)
        work_tokens = sum(tokens for _, tokens in returned) / (FEW_ENGINES * self.slots)
        self.ratios.append(clock.now / (TOKEN_SECONDS * max(longest, work_tokens)))
        return 0.0


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("slots", [1024, 256, 128, 64, 16])
@pytest.mark.parametrize("order", ["draw", "arrival"])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.extended) for seed in (2, 3))])
def test_engines_are_not_idle_where_groups_are_carried(
    seed: int, order: SampleOrder, slots: int, tmp_path: Path
) -> None:
    """Slots that get free at the end of a step go on with prompts of the next one, in any number of waves."""
    kept, lengths = draw_rows(seed, rows := 4 * STEPS * FEW_WANTED)
    config = RunConfig.model_validate(
        {
            "data": {"train_files": "x", "rollout_batch_size": FEW_WANTED},
            "model": {"path": "y"},
            "rollout": {"n": RESPONSES, "order": order, "unfinished": "carry"},
            "algorithm": {"rollout_correction_cap": 2.0},
        }
    )
    stream = PromptStream(PromptSets([Rows(rows)]), seed=1, shuffle=False)  # type: ignore[list-item]
    pool, carry, keep_rate = Pool(kept), Carry(stream), KeepRate()
    keep_rate.seen = SEEN
    sampler = Sampler(pool, carry, lengths, slots)
    collector = Collector(
        config, stream, keep_rate, carry, sampler, Grader(pool, max_error_share=1.0),  # type: ignore[arg-type]
        SamplingSettings(max_tokens=MOST_TOKENS, keeps_unfinished=True),
        FormatShare("mathruler", asks=False, has_tokens=False, say=lambda line: None),
    )  # fmt: skip
    log = RunLog(tmp_path)
    for step in range(1, STEPS + 1):
        with log.step(step):
            groups = collector.groups(step, log)
        assert len(groups) == FEW_WANTED
        assert all(
            len(item.response.token_ids) == lengths[item.response.prompt.row, item.response.sample]
            for group in groups
            for item in group
        )
        assert len(carry.groups) <= FEW_WANTED / RATE, "no more than a step needs"
    assert sum(sampler.ratios[1:]) / (STEPS - 1) <= LEAST_TIME_BAR
