"""Steps 1 to 3 of the loop: sample groups of responses, grade them, keep the groups with right and wrong ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_vppo.algorithm.grouping import keep_group
from megatron_vppo.algorithm.types import GradedResponse, Prompt, Response
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.data.stream import PromptStream
from megatron_vppo.observability.metrics import RunLog
from megatron_vppo.observability.phases import REWARD, SAMPLE
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.rollout.records import SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler, group_seeds
from megatron_vppo.trainer.grader import Grader
from megatron_vppo.trainer.stopping import Durations

logger = logging.getLogger(__name__)

Group = list[GradedResponse]


@dataclass(frozen=True)
class Collector:
    """Draws prompts, and samples and grades a group of responses to each. Every rank gets the same groups."""

    config: RunConfig
    stream: PromptStream | None
    """On rank 0; None elsewhere."""
    sampler: EngineSampler
    grader: Grader
    sampling: SamplingSettings
    durations: Durations

    def place(self) -> dict[str, Any]:
        """Returns the place in the order of prompts, on rank 0; {} elsewhere."""
        return {} if self.stream is None else self.stream.state_dict()

    def go_back_to(self, place: dict[str, Any]) -> None:
        """Gives back the prompts that were drawn since `place`: a step that was cut off is taken again from there."""
        if self.stream is not None:
            self.stream.load_state_dict(place)

    def groups(self, step: int, log: RunLog) -> list[Group]:
        """Returns at most rollout_batch_size groups to train on.

        After max_try_make_batch rounds of sampling the step goes on with the groups that it has, which may be none.

        Raises StopRequested if the run is to end.
        """
        wanted, rounds = self.config.data.rollout_batch_size, self.config.algorithm.max_try_make_batch
        sampled: list[Group] = []
        kept: list[Group] = []
        for attempt in range(rounds):
            new = self._sample(step, attempt, log)
            sampled += new
            kept += [group for group in new if self._keeps(group)]
            if len(kept) >= wanted:
                break
        if len(kept) < wanted and (rounds > 1 or not kept) and dist.get_rank() == 0:
            logger.warning(
                "step %d: %d of %d wanted groups have right and wrong answers after %d rounds of %d prompts; training "
                "on those, or skipping the step if there are none. More rounds: algorithm.max_try_make_batch; or use "
                "prompts of middle difficulty.",
                step, len(kept), wanted, rounds, wanted,
            )  # fmt: skip
        log.add_all(_sampling_metrics(sampled))
        log.add("rollout/attempts", attempt + 1)
        log.add("rollout/sampled_groups", len(sampled))
        log.add("rollout/kept_groups", len(kept))
        log.add("rollout/trained_groups", min(len(kept), wanted))
        return kept[:wanted]

    def _sample(self, step: int, attempt: int, log: RunLog) -> list[Group]:
        size = self.config.data.rollout_batch_size
        with log.span(SAMPLE.span):
            prompts: list[Prompt] = from_rank_zero(lambda: self._draw(size))
            seeds = group_seeds(
                prompts,
                kind=self.config.rollout.seeds,
                run_seed=self.config.trainer.seed,
                step=step,
                attempt=attempt,
                n=self.config.rollout.n,
            )
            groups = self.sampler.generate(prompts, seeds=seeds, sampling=self.sampling, first_group=attempt * size)
        with log.span(REWARD.span), self.durations.time("grading"):
            return grade_groups(self.grader, groups)

    def _draw(self, size: int) -> list[Prompt]:
        assert self.stream is not None, "prompts are drawn on rank 0"
        return self.stream.next(size)

    def _keeps(self, group: Group) -> bool:
        algorithm = self.config.algorithm
        return not algorithm.online_filtering or keep_group(
            [item.reward.accuracy for item in group], low=algorithm.filter_low, high=algorithm.filter_high
        )


def grade_groups(grader: Grader, groups: Sequence[Sequence[Response]]) -> list[Group]:
    """Grades every response, group by group."""
    graded = iter(grader.grade([response for group in groups for response in group]))
    return [[next(graded) for _ in group] for group in groups]


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
