"""Settings of small runs for the tests of the dry run, and models whose layers divide."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig

from megatron_vppo.config.schema import RunConfig
from tests.models.tiny import tiny_config

PROMPT, RESPONSE = 40, 9
IMAGE_TOKENS = 12


def run_config(**sections: dict[str, Any]) -> RunConfig:
    """Four groups of three rows of 40 + 9 tokens, of which 12 are an image's; two rows to a micro-batch."""
    base: dict[str, dict[str, Any]] = {
        "data": {
            "train_files": "rows.parquet",
            "max_prompt_length": PROMPT,
            "max_response_length": RESPONSE,
            "min_pixels": 28 * 28,
            "max_pixels": IMAGE_TOKENS * 28 * 28,
            "rollout_batch_size": 8,
        },
        "model": {"path": "folder", "dtype": "bfloat16"},
        "actor": {
            "global_batch_size": 4,
            "micro_batch_size_per_device_for_update": 2,
            "micro_batch_size_per_device_for_experience": 3,
        },
        "rollout": {"n": 3},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return RunConfig.model_validate(base)


def four_layers(**text: object) -> Qwen2_5_VLConfig:
    """A model of a few thousand parameters, with 299 tokens: neither even nor a multiple of any alignment."""
    return tiny_config(tied=False, vocab=299, num_hidden_layers=4, **text)
