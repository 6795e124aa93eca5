"""Steps 1 to 3 of the loop: sample groups of responses, grade them, keep the groups with right and wrong ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vppo.algorithm.grouping import keep_group
from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.stream import PromptStream, StreamPosition
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.observability.phases import REWARD, SAMPLE
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.rollout.conductor import Ask, Work
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.records import SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.rollout.seeds import sample_seeds
from megatron_vppo.rollout.sharing import share_groups
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
    sampler: EngineSampler
    grader: Grader
    sampling: SamplingSettings

    def place(self) -> dict[str, Any]:
        """Returns the place in the order of prompts and the keep rate, on rank 0; {} elsewhere."""
        if self.stream is None:
            return {}
        return {"stream": self.stream.state_dict(), "keep_rate": self.keep_rate.state_dict()}

    def go_back_to(self, place: dict[str, Any]) -> None:
        """Gives back the prompts that were drawn since `place`: a step that was cut off is taken again from there."""
        if self.stream is not None:
            self.stream.load_state_dict(place["stream"])
            self.keep_rate.load_state_dict(place["keep_rate"])

    def groups(self, step: int, log: RunLog) -> list[Group]:
        """Returns at most rollout_batch_size groups to train on.

        After max_try_make_batch times as many prompts the step goes on with the groups that it has, which may be none.

        Raises StopRequested if the run is to end.
        """
        drawn = None if self.stream is None else DrawnPrompts(self.stream, self.config.data.rollout_batch_size)
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
        )
        judge = self.grader.judge(drawn.prompt, size=n, keeps=self._keeps, least=wanted * n)

        def ask(number: int) -> Ask:
            prompt = drawn.prompt(number)
            return prompt, sample_seeds(
                config.rollout.seeds, n=n, run_seed=config.trainer.seed, step=step,
                attempt=number // wanted, split=prompt.split, row=prompt.row,
            )  # fmt: skip

        return _Sampling(judge, Work(draw, ask, judge))

    def _end(self, step: int, drawn: DrawnPrompts, here: _Sampling, log: RunLog) -> None:
        """Gives back the prompts that were not needed, and notes what was sampled."""
        draw, wanted = here.work.draw, self.config.data.rollout_batch_size
        here.judge.check()
        sampled = [here.judge.group(number) for number in draw.needed]
        num_kept = sum(map(self._keeps, sampled))
        drawn.give_back_after(draw.used)
        if self.config.algorithm.online_filtering:
            self.keep_rate.note(kept=num_kept, sampled=len(sampled))
        if num_kept < wanted and (len(sampled) > wanted or not num_kept):
            logger.warning(
                "step %d: %d of %d wanted groups have right and wrong answers after %d prompts; training on those, or "
                "skipping the step if there are none. More prompts: algorithm.max_try_make_batch (times %d); or use "
                "prompts of middle difficulty.",
                step, num_kept, wanted, len(sampled), wanted,
            )  # fmt: skip
        log.add_all(_sampling_metrics(sampled))
        log.add("rollout/attempts", -(-len(sampled) // wanted))
        log.add("rollout/sampled_groups", len(sampled))
        log.add("rollout/kept_groups", num_kept)
        log.add("rollout/trained_groups", len(draw.chosen))
        log.add("perf/dropped_groups", draw.given - len(sampled))

    def _keeps(self, group: Group) -> bool:
        algorithm = self.config.algorithm
        return not algorithm.online_filtering or keep_group(
            [item.reward.accuracy for item in group], low=algorithm.filter_low, high=algorithm.filter_high
        )


@dataclass
class DrawnPrompts:
    """The prompts of one draw, taken from the stream when they are needed, as many at a time as a step wants groups."""

    stream: PromptStream
    at_a_time: int
    _prompts: list[Prompt] = field(default_factory=list)
    _starts: list[StreamPosition] = field(default_factory=list)
    """The place of the first prompt of each taking."""

    def prompt(self, number: int) -> Prompt:
        """Returns a prompt by its number, from 0 in the order of the stream."""
        while number >= len(self._prompts):
            self._prompts += self.stream.next(self.at_a_time)
            after = self.stream.position
            self._starts.append(StreamPosition(after.epoch, after.offset - self.at_a_time))
        return self._prompts[number]

    def give_back_after(self, used: int) -> None:
        """Moves the stream to just behind the first `used` prompts, which are at least one."""
        start = self._starts[(used - 1) // self.at_a_time]
        self.stream.move_to(StreamPosition(start.epoch, start.offset + (used - 1) % self.at_a_time + 1))


@dataclass(frozen=True)
class _Sampling:
    """The sampling of one step, on rank 0."""

    judge: GroupJudge
    work: Work

    def chosen(self) -> list[Group]:
        return [self.judge.group(number) for number in self.work.draw.chosen]


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
