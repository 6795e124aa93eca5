"""Qwen2.5-VL: the parts that the families do not share."""

from __future__ import annotations

import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig

from megatron_vppo.models.family import Family
from megatron_vppo.models.language.mrope import mrope_position_fn, sectioned_mrope
from megatron_vppo.models.qwen25_vl.vision import Qwen25VisionTower
from megatron_vppo.models.qwen25_vl.weight_map import to_released_name, vision_entries


def _check(hf_config: Qwen2_5_VLConfig) -> None:
    if any(kind != "full_attention" for kind in hf_config.text_config.layer_types):
        raise ValueError("sliding window attention is not supported; set use_sliding_window to false")


QWEN25_VL = Family(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    check_own=_check,
    deepstack_layers=lambda hf_config: 0,
    qkv_bias=True,
    qk_norm=False,
    mrope_section=(16, 24, 24),
    mrope_interleaved=False,
    positions=mrope_position_fn,
    rotary=sectioned_mrope,
    vision_activation="silu",
    vision_options={"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu},
    vision_tower=Qwen25VisionTower,
    vision_entries=vision_entries,
    language_prefix="model.",
    to_released_name=to_released_name,
)
