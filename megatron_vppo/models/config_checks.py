"""The numbers of a model's configuration: each in its range, and all of them fitting one another.

transformers checks types alone. What does not fit shows only when a layer is built, in the middle of a rank's start, or
in vLLM, which reads some fields that transformers leaves alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_vppo.models.family import Family
from megatron_vppo.models.hf_config import VISION_TOKENS, HfConfig, head_dim

_TEXT_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_VISION_COUNTS = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size")
"""Fields that have to be at least 1. All checks after that one may divide by them."""


def complete_config(hf_config: HfConfig, family: Family) -> None:
    """Fills in, as transformers does while it builds the model, what a configuration may leave out.

    With it written into the configuration, Megatron and vLLM (`engine_overrides`) read the same. Without
    `mrope_section`, vLLM would take positions of one coordinate.
    """
    rope = hf_config.text_config.rope_parameters
    rope.setdefault("mrope_section", list(family.mrope_section))
    if family.mrope_interleaved:
        rope.setdefault("mrope_interleaved", True)
    if not hf_config.architectures:
        hf_config.architectures = [family.architecture]


def engine_overrides(hf_config: HfConfig) -> dict[str, Any]:
    """Returns the fields that vLLM has to take from here, since it reads the model's folder by itself: those that
    `complete_config` may have filled in.
    """
    text = hf_config.text_config
    return {
        "architectures": list(hf_config.architectures),
        "text_config": {"rope_parameters": dict(text.rope_parameters)},
    }


def config_problems(hf_config: HfConfig, family: Family) -> list[str]:
    """Returns one line for each number that cannot work; without any, the model can be built."""
    text, vision = hf_config.text_config, hf_config.vision_config
    small = [
        f"{section}.{name} is {value}, it must be a whole number of at least 1"
        for section, names, config in (("text_config", _TEXT_COUNTS, text), ("vision_config", _VISION_COUNTS, vision))
        for name in names
        if not isinstance(value := getattr(config, name), int) or value < 1
    ]
    return small or [
        *_rotary_problems(text, family),
        *_size_problems(text, vision),
        *_vision_problems(vision),
        *_token_problems(hf_config),
        *_engine_problems(hf_config, family),
    ]


def _rotary_problems(text: Any, family: Family) -> Iterator[str]:
    rope, frequencies = text.rope_parameters, head_dim(text) // 2
    section = rope["mrope_section"]
    is_list = isinstance(section, list | tuple) and all(isinstance(count, int) and count > 0 for count in section)
    if not (is_list and len(section) == 3 and sum(section) == frequencies):
        yield (
            f"text_config: mrope_section is {section} and must be three numbers above 0 that sum to {frequencies}, "
            f"half of the {head_dim(text)} values of a head (left out, it is {list(family.mrope_section)})"
        )
    theta = rope.get("rope_theta")
    if not isinstance(theta, int | float) or not theta > 0:
        yield f"text_config: rope_theta is {theta!r} and must be a number above 0"
    if bool(rope.get("mrope_interleaved", False)) != family.mrope_interleaved:
        yield (
            f"text_config: mrope_interleaved is {rope['mrope_interleaved']}, but models of type {family.model_type} "
            f"have {family.mrope_interleaved}; leave it out"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        yield f"text_config: partial_rotary_factor is {rope['partial_rotary_factor']}, only 1 is supported"


def _size_problems(text: Any, vision: Any) -> Iterator[str]:
    if text.num_attention_heads % text.num_key_value_heads:
        yield (
            f"text_config: {text.num_attention_heads} attention heads cannot share {text.num_key_value_heads} "
            "key-value heads evenly"
        )
    if getattr(text, "head_dim", None) is None and text.hidden_size % text.num_attention_heads:
        yield f"text_config: hidden_size {text.hidden_size} does not divide by {text.num_attention_heads} heads"
    if vision.hidden_size % vision.num_heads:
        yield f"vision_config: hidden_size {vision.hidden_size} does not divide by {vision.num_heads} heads"
    elif vision.hidden_size // vision.num_heads % 4:
        yield (
            f"vision_config: heads of {vision.hidden_size // vision.num_heads} values; rotary rows and columns need a "
            "multiple of 4"
        )
    if not text.rms_norm_eps > 0:
        yield f"text_config: rms_norm_eps is {text.rms_norm_eps} and must be above 0"


def _vision_problems(vision: Any) -> Iterator[str]:
    if vision.in_channels != 3 or vision.temporal_patch_size != 2:
        yield (
            f"vision_config: {vision.in_channels} channels and {vision.temporal_patch_size} frames per patch; images "
            "come with 3 and 2"
        )
    block = vision.patch_size * vision.spatial_merge_size
    window = getattr(vision, "window_size", None)
    if window is not None and window // block < 1:
        yield f"vision_config: a window of {window} pixels is smaller than a merged patch of {block}"
    full = getattr(vision, "fullatt_block_indexes", [])
    if outside := [layer for layer in full if not 0 <= layer < vision.depth]:
        yield f"vision_config: fullatt_block_indexes names the layers {outside}, there are {vision.depth}"


def _token_problems(hf_config: HfConfig) -> Iterator[str]:
    """Checks that every token with a role has a row of the embedding."""
    vocabulary = hf_config.text_config.vocab_size
    roles = {name: getattr(hf_config, name, None) for name in VISION_TOKENS}
    for name, token in roles.items():
        if token is not None and not 0 <= token < vocabulary:
            yield f"{name} is {token}, the vocabulary has {vocabulary} tokens"
    pad = hf_config.text_config.pad_token_id
    if pad is not None and not -vocabulary <= pad < vocabulary:  # below 0 it counts from the end, as in torch
        yield f"text_config.pad_token_id is {pad}, the vocabulary has {vocabulary} tokens"
    if hf_config.image_token_id is None:
        yield "image_token_id is missing"


def _engine_problems(hf_config: HfConfig, family: Family) -> Iterator[str]:
    if family.architecture not in hf_config.architectures:
        yield (
            f"architectures is {hf_config.architectures}, but models of type {family.model_type} are "
            f"{family.architecture}"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        yield "quantization_config: the weights are quantised; training needs them in 16 or 32 bits"
