"""Steps 1 to 3 of the loop: sample groups of responses, grade them, keep the groups with right and wrong ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from megatron_vppo.algorithm.grouping import keep_group
from megatron_vppo.algorithm.overlong import overlong_reward
from megatron_vppo.algorithm.types import Prompt, Response, Reward
from megatron_vppo.config.data_files import names_of
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.stream import PromptStream, StreamPosition
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.observability.phases import REWARD, SAMPLE
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.rollout.carry import CarriedGroup, Carry
from megatron_vppo.rollout.conductor import Work
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.records import Ask, SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.rollout.seeds import sample_seeds
from megatron_vppo.rollout.sharing import share_groups
from megatron_vppo.trainer.format_share import FormatShare
from megatron_vppo.trainer.grader import Grader, Group, GroupJudge, graded_groups, verdicts_of
from megatron_vppo.trainer.keep_rate import KeepRate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collector:
    """Draws prompts, and samples and grades a group of responses to each. Every rank gets the same groups."""

    config: RunConfig
    stream: PromptStream | None
    """On rank 0; None elsewhere."""
    keep_rate: KeepRate
    """The one that counts is that of rank 0."""
    carry: Carry
    """Likewise."""
    sampler: EngineSampler
    grader: Grader
    sampling: SamplingSettings
    format_share: FormatShare

    def place(self) -> dict[str, Any]:
        """Returns the place in the order of prompts, the keep rate and what is carried, on rank 0; {} elsewhere."""
        if self.stream is None:
            return {}
        return {
            "stream": self.stream.state_dict(),
            "keep_rate": self.keep_rate.state_dict(),
            "carry": self.carry.state_dict(),
        }

    def go_back_to(self, place: dict[str, Any]) -> None:
        """Gives back the prompts that were drawn since `place`: a step that was cut off is taken again from there."""
        if self.stream is not None:
            self.stream.load_state_dict(place["stream"])
            self.keep_rate.load_state_dict(place["keep_rate"])
            self.carry.load_state_dict(place["carry"])

    def groups(self, step: int, log: RunLog) -> list[Group]:
        """Returns at most rollout_batch_size groups to train on.

        After max_try_make_batch times as many prompts the step goes on with the groups that it has, which may be none.

        Raises StopRequested if the run is to end.
        """
        wanted = self.config.data.rollout_batch_size
        drawn = None if self.stream is None else DrawnPrompts(self.stream, wanted, self._carried())
        tries: list[_Sampling] = []

        def work() -> Work:
            assert drawn is not None, "prompts are drawn on rank 0"
            tries.append(self._begin(step, drawn))
            return tries[-1].work

        with log.span(SAMPLE.span):
            idle_seconds = self.sampler.sample(work, self.sampling)
        log.add(f"timing_s/{SAMPLE.span}", -idle_seconds)
        with log.span(REWARD.span):
            groups = share_groups(lambda: [tries[-1].judge.responses(i) for i in tries[-1].work.draw.chosen])
            verdicts = from_rank_zero(lambda: verdicts_of(tries[-1].chosen()))
        log.add(f"timing_s/{REWARD.span}", idle_seconds)
        if drawn is not None:
            self._end(step, drawn, tries[-1], log)
        return graded_groups(groups, verdicts)

    def _begin(self, step: int, drawn: DrawnPrompts) -> _Sampling:
        config, wanted, n = self.config, self.config.data.rollout_batch_size, self.config.rollout.n
        rounds = config.algorithm.max_try_make_batch if config.algorithm.online_filtering else 1
        draw = Draw(
            wanted=wanted,
            most=rounds * wanted,
            responses=n,
            order=config.rollout.order,
            seen=self.keep_rate.seen,
            missing=[len(group.missing) for group in drawn.carried],
            ahead=config.rollout.unfinished == "carry" and not self.grader.grades_batches,
        )
        judge = self.grader.judge(
            drawn.prompt, size=n, keeps=self._keeps, least=wanted * n,
            change=self._with_length if config.reward.overlong_buffer_tokens else None,
            carried=dict(enumerate(drawn.carried)),
        )  # fmt: skip

        def seeds(number: int) -> tuple[int | None, ...]:
            prompt = drawn.prompt(number)
            return sample_seeds(
                config.rollout.seeds, n=n, run_seed=config.trainer.seed, step=step,
                attempt=(number - len(drawn.carried)) // wanted, split=prompt.split, row=prompt.row,
            )  # fmt: skip

        def ask(number: int) -> Ask:
            if number < len(drawn.carried):
                return drawn.carried[number].ask()
            return Ask(drawn.prompt(number), seeds(number))

        return _Sampling(judge, Work(draw, ask, judge), seeds)

    def _with_length(self, response: Response, reward: Reward) -> Reward:
        """Takes the penalty on an overlong response from its reward. A reward that failed stays zero."""
        if reward.error is not None:
            return reward
        config = self.config
        added = config.reward.overlong_penalty * overlong_reward(
            len(response.token_ids),
            most=config.data.max_response_length,
            buffer=config.reward.overlong_buffer_tokens,
        )
        return replace(reward, overall=reward.overall + added, metrics={**reward.metrics, "overlong": added})

    def _carried(self) -> tuple[CarriedGroup, ...]:
        """Returns the groups that this step goes on with. Settings may have changed since they were begun."""
        carries = self.config.rollout.unfinished == "carry"
        fitting = tuple(group for group in self.carry.groups if carries and self._fits(group))
        if left := len(self.carry.groups) - len(fitting):
            logger.warning(
                "%d groups of the step before do not fit rollout.unfinished, rollout.n or data.max_response_length any "
                "more, and are left behind", left,
            )  # fmt: skip
        return fitting

    def _fits(self, group: CarriedGroup) -> bool:
        longest = self.config.data.max_response_length
        return (
            len(group.seeds) == self.config.rollout.n
            and all(len(one.token_ids) <= longest for one in group.ended)
            and all(len(group.begun(sample)) < longest for sample in group.missing)
        )

    def _end(self, step: int, drawn: DrawnPrompts, here: _Sampling, log: RunLog) -> None:
        """Gives back the prompts that were not needed, and notes what was sampled."""
        draw, wanted = here.work.draw, self.config.data.rollout_batch_size
        here.judge.check()
        sampled = [here.judge.group(number) for number in draw.needed]
        num_kept = sum(map(self._keeps, sampled))
        carries = self.config.rollout.unfinished == "carry"
        drawn.give_back_after(draw.reached if carries else draw.used)
        left = set(range(max(draw.reached, len(drawn.carried)))) - set(draw.needed) if carries else set()
        self.carry.groups = tuple(here.left(number, drawn) for number in sorted(left))
        if self.config.algorithm.online_filtering:
            self.keep_rate.note(kept=num_kept, sampled=len(sampled))
        if num_kept < wanted and (len(sampled) > wanted or not num_kept):
            logger.warning(
                "step %d: %d of %d wanted groups have right and wrong answers after %d prompts; training on those, or "
                "skipping the step if there are none. More prompts: algorithm.max_try_make_batch (times %d); or use "
                "prompts of middle difficulty.",
                step, num_kept, wanted, len(sampled), wanted,
            )  # fmt: skip
        if step == 1:
            self.format_share.look([item for group in sampled for item in group], where="of the first step")
        log.add_all(_sampling_metrics(sampled))
        log.add_all(_metrics_of_files(names_of(self.config.data, "train"), sampled, trained=here.chosen()))
        log.add("rollout/attempts", -(-len(sampled) // wanted))
        log.add("rollout/sampled_groups", len(sampled))
        log.add("rollout/kept_groups", num_kept)
        log.add("rollout/trained_groups", len(draw.chosen))
        if carries:
            log.add("rollout/carried_groups", len(left))
            log.add("rollout/carried_share", _carried_share([one.response for one in chain(*here.chosen())]))
        else:
            log.add("perf/dropped_groups", draw.given - len(sampled))

    def _keeps(self, group: Group) -> bool:
        algorithm = self.config.algorithm
        return not algorithm.online_filtering or keep_group(
            [item.reward.accuracy for item in group], low=algorithm.filter_low, high=algorithm.filter_high
        )


@dataclass
class DrawnPrompts:
    """The prompts of one draw: those of carried groups, then others from the stream.

    They are taken from the stream when they are needed, as many at a time as a step wants groups.
    """

    stream: PromptStream
    at_a_time: int
    carried: tuple[CarriedGroup, ...] = ()
    _prompts: list[Prompt] = field(default_factory=list)
    _starts: list[StreamPosition] = field(default_factory=list)
    """The place of the first prompt of each taking."""

    def prompt(self, number: int) -> Prompt:
        """Returns a prompt by its number, from 0."""
        if number < len(self.carried):
            return self.carried[number].prompt
        number -= len(self.carried)
        while number >= len(self._prompts):
            self._prompts += self.stream.next(self.at_a_time)
            after = self.stream.position
            self._starts.append(StreamPosition(after.epoch, after.offset - self.at_a_time))
        return self._prompts[number]

    def give_back_after(self, used: int) -> None:
        """Moves the stream to just behind the first `used` prompts."""
        used -= len(self.carried)
        if used > 0:
            start = self._starts[(used - 1) // self.at_a_time]
            self.stream.move_to(StreamPosition(start.epoch, start.offset + (used - 1) % self.at_a_time + 1))
        elif self._starts:
            self.stream.move_to(self._starts[0])


@dataclass(frozen=True)
class _Sampling:
    """The sampling of one step, on rank 0."""

    judge: GroupJudge
    work: Work
    seeds: Callable[[int], tuple[int | None, ...]]
    """Returns those of a prompt that is not carried."""

    def chosen(self) -> list[Group]:
        return [self.judge.group(number) for number in self.work.draw.chosen]

    def left(self, number: int, drawn: DrawnPrompts) -> CarriedGroup:
        """Returns what there is of a group that was not needed, for the next step."""
        seeds = drawn.carried[number].seeds if number < len(drawn.carried) else self.seeds(number)
        begun = {
            sample: replace(one, carried_tokens=len(one.token_ids)) for sample, one in self.judge.begun(number).items()
        }
        return CarriedGroup(drawn.prompt(number), seeds, begun)


def _sampling_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Averages over everything that was sampled, including groups that are not trained on."""
    items = [item for group in groups for item in group]
    rewards = [item.reward.overall for item in items]
    lengths = [len(item.response.token_ids) for item in items]
    prompts = [len(item.response.prompt.token_ids) for item in items]
    metrics = {
        "reward/accuracy": _mean([item.reward.accuracy for item in items]),
        "reward/errors": float(sum(item.reward.error is not None for item in items)),
        "response_length/clip_ratio": _mean([float(item.response.finish_reason == "length") for item in items]),
        "perf/total_num_tokens": float(sum(lengths) + sum(prompts)),
    }
    for name, values in (("critic/score", rewards), ("response_length", lengths), ("prompt_length", prompts)):
        metrics |= {f"{name}/mean": _mean(values), f"{name}/max": max(values), f"{name}/min": min(values)}
    for name in sorted({name for item in items for name in item.reward.metrics}):
        metrics[f"reward/{name}"] = _mean([item.reward.metrics[name] for item in items if name in item.reward.metrics])
    return metrics


def _metrics_of_files(names: Sequence[str], sampled: Sequence[Group], *, trained: Sequence[Group]) -> dict[str, float]:
    """Returns each file's share of the groups that are trained on, and means over all that was sampled of it."""
    metrics: dict[str, float] = {}
    for name in names:
        if trained:
            of_file = sum(group[0].response.prompt.split == f"train/{name}" for group in trained)
            metrics[f"data/{name}/trained_share"] = of_file / len(trained)
        items = [item for item in chain(*sampled) if item.response.prompt.split == f"train/{name}"]
        if items:
            metrics[f"data/{name}/reward"] = _mean([item.reward.overall for item in items])
            metrics[f"data/{name}/accuracy"] = _mean([item.reward.accuracy for item in items])
    return metrics


def _carried_share(responses: Sequence[Response]) -> float:
    """Returns the share of tokens that were sampled with the weights of earlier steps; 0 of no tokens."""
    tokens = sum(len(one.token_ids) for one in responses)
    return sum(one.carried_tokens for one in responses) / tokens if tokens else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
