"""The model families that can be trained."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_vppo.models.family import Family
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.language.weight_map import HEAD, language_entries
from megatron_vppo.models.qwen3_vl.family import QWEN3_VL
from megatron_vppo.models.qwen25_vl.family import QWEN25_VL
from megatron_vppo.weights.entries import Entry

FAMILIES = {family.model_type: family for family in (QWEN25_VL, QWEN3_VL)}


def family_of(hf_config: HfConfig) -> Family:
    """Returns the family of a model's configuration.

    Raises:
        ValueError: another architecture, or a setting of this one that no released model uses.
    """
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ValueError(
            f"a model of type {hf_config.model_type!r} is not supported; {', '.join(sorted(FAMILIES))} are"
        )
    text, vision = hf_config.text_config, hf_config.vision_config
    if text.rope_parameters["rope_type"] != "default" or vision.rope_parameters["rope_type"] != "axial":
        raise ValueError(
            f"rope types {text.rope_parameters['rope_type']!r} (text) and {vision.rope_parameters['rope_type']!r} "
            "(vision) are not supported; only 'default' and 'axial' are"
        )
    if text.hidden_act != "silu" or vision.hidden_act != family.vision_activation:
        raise ValueError(
            f"activations {text.hidden_act!r} (text) and {vision.hidden_act!r} (vision) are not supported; only 'silu' "
            f"and {family.vision_activation!r} are"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(
            f"vision features of width {vision.out_hidden_size} do not fit hidden size {text.hidden_size}; "
            "vision_config.out_hidden_size and text_config.hidden_size must be equal"
        )
    family.check_own(hf_config)
    return family


def weight_map(hf_config: HfConfig, *, family: Family) -> tuple[Entry, ...]:
    """Lists every parameter of the model, in the order of the forward pass."""
    language = language_entries(
        hf_config, prefix=family.language_prefix, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm
    )
    return (*family.vision_entries(hf_config.vision_config), *language)


def hf_copies(entries: Iterable[Entry]) -> dict[str, str]:
    """Returns the tensors that the model takes from another one: their names, each with that one's name."""
    tied_head = next((entry for entry in entries if entry.is_copy), None)
    return {HEAD: tied_head.hf_names[0]} if tied_head else {}
