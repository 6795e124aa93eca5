"""Validation: the mean accuracy over k responses to each held-out prompt (avg@k)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vppo.algorithm.types import Prompt
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.rollout.records import SamplingSettings
from megatron_vppo.rollout.sampler import EngineSampler, group_seeds
from megatron_vppo.trainer.collect import grade_groups
from megatron_vppo.trainer.grader import Grader


@dataclass(frozen=True)
class Validator:
    """Samples and grades responses to the held-out prompts."""

    config: RunConfig
    prompts: Sequence[Prompt]
    """The same on every rank."""
    sampler: EngineSampler
    grader: Grader
    sampling: SamplingSettings

    def run(self) -> dict[str, float]:
        """Returns the means over val.n responses to each prompt.

        Seeds do not depend on the step, so that two validations differ by the weights alone.
        """
        n = self.config.rollout.val.n
        seeds = group_seeds(self.prompts, kind="independent", run_seed=self.config.trainer.seed, step=0, attempt=0, n=n)
        groups = grade_groups(self.grader, self.sampler.generate(self.prompts, seeds=seeds, sampling=self.sampling))
        items = [item for group in groups for item in group]
        return {
            "val/accuracy": sum(item.reward.accuracy for item in items) / len(items),
            "val/reward_score": sum(item.reward.overall for item in items) / len(items),
            "val/response_length": sum(len(item.response.token_ids) for item in items) / len(items),
            "val/errors": float(sum(item.reward.error is not None for item in items)),
            "val/clip_ratio": sum(item.response.finish_reason == "length" for item in items) / len(items),
        }
