"""A model's configuration in transformers, and what follows from it alone."""

from __future__ import annotations

from typing import Any

HfConfig = Any
"""A Qwen-VL configuration of transformers: `text_config`, `vision_config`, `tie_word_embeddings`, token ids."""


def head_dim(text: Any) -> int:
    """Returns the values per attention head of a text configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


VISION_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)
"""Configuration fields of the tokens that must not be sampled: the next forward pass would look for their pixels."""


def vision_token_ids(hf_config: HfConfig) -> tuple[int, ...]:
    """Returns the ids of the tokens in VISION_TOKENS that the configuration has."""
    return tuple(token for name in VISION_TOKENS if (token := getattr(hf_config, name, None)) is not None)


def position_refusal(hf_config: HfConfig, *, prompt: int, response: int) -> str | None:
    """Says that a prompt and its response have more tokens than the model has positions; None: they fit."""
    positions = hf_config.text_config.max_position_embeddings
    if prompt + response <= positions:
        return None
    return f"{prompt + response} tokens, but the model has {positions} positions (max_position_embeddings)"


def kv_bytes_per_token(hf_config: HfConfig, *, ranks: int, dtype_bytes: int) -> int:
    """Counts the bytes of a token's keys and values on a rank of an engine, which holds at least one key-value head."""
    text = hf_config.text_config
    return 2 * text.num_hidden_layers * max(1, text.num_key_value_heads // ranks) * head_dim(text) * dtype_bytes


def pixels_per_token(hf_config: HfConfig) -> int:
    """Returns the pixels of the square of an image that becomes one token of the language model."""
    vision = hf_config.vision_config
    return (vision.patch_size * vision.spatial_merge_size) ** 2


def vllm_split_refusal(hf_config: HfConfig, ranks: int) -> str | None:
    """Names the heads or MLP values that vLLM cannot divide among the GPUs of an engine; None: it can divide all.

    Key-value heads may be copied instead, as long as each has equally many copies.
    """
    text, vision = hf_config.text_config, hf_config.vision_config
    if text.num_key_value_heads % ranks and ranks % text.num_key_value_heads:
        return f"{text.num_key_value_heads} key-value heads"
    numbers = {
        "attention heads": text.num_attention_heads,
        "values of the MLP": text.intermediate_size,
        "vision attention heads": vision.num_heads,
        "values of the vision MLP": vision.intermediate_size,
    }
    return next((f"{number} {name}" for name, number in numbers.items() if number % ranks), None)
