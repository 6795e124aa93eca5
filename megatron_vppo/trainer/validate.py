"""Validation: the mean accuracy over k responses to each held-out prompt (avg@k)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vppo.algorithm.types import GradedResponse, Prompt
from megatron_vppo.config.data_files import names_of
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.parallel.collective import from_rank_zero
from megatron_vppo.rollout.conductor import Work
from megatron_vppo.rollout.draw import Draw
from megatron_vppo.rollout.records import Ask, SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler
from megatron_vppo.rollout.seeds import sample_seeds
from megatron_vppo.trainer.format_share import FormatShare
from megatron_vppo.trainer.grader import Grader, GroupJudge
from megatron_vppo.trainer.recorder import Recorder


@dataclass(frozen=True)
class Validator:
    """Samples and grades responses to the held-out prompts."""

    config: RunConfig
    prompts: Sequence[Prompt]
    """On rank 0; what other ranks have is not looked at."""
    sampler: EngineSampler
    grader: Grader
    sampling: SamplingSettings
    recorder: Recorder
    format_share: FormatShare

    def run(self, step: int) -> dict[str, float]:
        """Returns the means over val.n responses to each prompt, and has the responses recorded.

        Seeds do not depend on the step, so that two validations differ by the weights alone. Raises OSError if the
        records before these could not be written.
        """
        config, n = self.config, self.config.rollout.val.n
        found: list[GroupJudge] = []

        def ask(number: int) -> Ask:
            prompt = self.prompts[number]
            seeds = sample_seeds(
                "independent", n=n, run_seed=config.trainer.seed, step=0, attempt=0, split=prompt.split, row=prompt.row
            )
            return Ask(prompt, seeds)

        def work() -> Work:
            count = len(self.prompts)
            prompt = functools.cache(self.prompts.__getitem__)  # built once for all responses, and let go afterwards
            found.append(self.grader.judge(prompt, size=n, keeps=lambda group: True, least=count * n))
            return Work(Draw(wanted=count, most=count, responses=n, order="draw"), ask, found[-1])

        self.sampler.sample(work, self.sampling)
        return from_rank_zero(lambda: self._outcome(step, found[-1]))

    def _outcome(self, step: int, judge: GroupJudge) -> dict[str, float]:
        items = [item for number in range(len(self.prompts)) for item in judge.group(number)]
        self.recorder.write_validation(step, items)
        if step == 0:
            self.format_share.look(items, where="of the validation before training")
        by_file = {
            f"val/{name}/accuracy": _mean([item.reward.accuracy for item in items if _is_of(item, name)])
            for name in names_of(self.config.data, "val")
        }
        return {
            **by_file,
            **_parts(items),
            "val/accuracy": sum(item.reward.accuracy for item in items) / len(items),
            "val/reward_score": sum(item.reward.overall for item in items) / len(items),
            "val/response_length": sum(len(item.response.token_ids) for item in items) / len(items),
            "val/errors": float(sum(item.reward.error is not None for item in items)),
            "val/clip_ratio": sum(item.response.finish_reason == "length" for item in items) / len(items),
        }


def _parts(items: Sequence[GradedResponse]) -> dict[str, float]:
    """Averages every other number that the reward function returned."""
    names = sorted({name for item in items for name in item.reward.metrics})
    return {
        f"val/reward/{name}": _mean([item.reward.metrics[name] for item in items if name in item.reward.metrics])
        for name in names
    }


def _is_of(item: GradedResponse, name: str) -> bool:
    return item.response.prompt.split == f"val/{name}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
