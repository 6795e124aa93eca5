"""The model families that can be trained."""

from __future__ import annotations

from megatron_vppo.models.family import Family
from megatron_vppo.models.qwen3_vl.family import QWEN3_VL
from megatron_vppo.models.qwen25_vl.family import QWEN25_VL
from megatron_vppo.models.transformer_config import HfConfig

FAMILIES = {family.model_type: family for family in (QWEN25_VL, QWEN3_VL)}


def family_of(hf_config: HfConfig) -> Family:
    """The family of a model's configuration.

    Raises:
        ValueError: another architecture, or a variant of this one that is not supported.
    """
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ValueError(
            f"model.path holds a model of type {hf_config.model_type!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    family.check_supported(hf_config)
    return family
