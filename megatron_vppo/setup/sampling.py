"""The settings of sampling, from those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.rollout.records import SamplingSettings


def eos_ids(source: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens at which the model stops, from its generation configuration, else from its tokenizer.

    Raises ValueError if neither names one.
    """
    eos: int | Sequence[int] | None = tokenizer.eos_token_id
    if (source / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(source).eos_token_id or eos
    if eos is None:
        raise ValueError(f"{source} names no EOS token, neither in generation_config.json nor in the tokenizer")
    return (eos,) if isinstance(eos, int) else tuple(eos)


def train_sampling(config: RunConfig, eos: tuple[int, ...]) -> SamplingSettings:
    """Returns the settings by which responses to train on are sampled."""
    rollout = config.rollout
    return SamplingSettings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=config.data.max_response_length,
        stop_token_ids=eos,
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
