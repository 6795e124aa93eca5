"""The settings of sampling, from those of a run."""

from __future__ import annotations

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.rollout.records import SamplingSettings


def train_sampling(config: RunConfig, eos: tuple[int, ...]) -> SamplingSettings:
    """Returns the settings by which responses to train on are sampled."""
    rollout = config.rollout
    return SamplingSettings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=config.data.max_response_length,
        stop_token_ids=eos,
        likeliest_tokens=config.algorithm.score_centering_tokens,
        keeps_unfinished=rollout.unfinished == "carry",
    )


def val_sampling(config: RunConfig, eos: tuple[int, ...]) -> SamplingSettings:
    """Returns the settings by which validation samples."""
    val = config.rollout.val
    return SamplingSettings(
        temperature=val.temperature,
        top_p=val.top_p,
        top_k=-1,
        max_tokens=config.data.max_response_length,
        stop_token_ids=eos,
    )
