"""Qwen2.5-VL: what is its own."""

from __future__ import annotations

import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig

from megatron_vppo.models.family import Family
from megatron_vppo.models.qwen25_vl.vision import VisionTower
from megatron_vppo.models.qwen25_vl.weight_map import released_name, vision_entries


def _check(hf_config: Qwen2_5_VLConfig) -> None:
    if any(kind != "full_attention" for kind in hf_config.text_config.layer_types):
        raise ValueError("sliding window attention is not supported; set use_sliding_window to false")


QWEN25_VL = Family(
    model_type="qwen2_5_vl",
    check_own=_check,
    deepstack_layers=lambda hf_config: 0,
    qkv_bias=True,
    qk_norm=False,
    interleaved_mrope=False,
    vision_activation="silu",
    vision_options={"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu},
    vision_tower=VisionTower,
    vision_entries=vision_entries,
    language_prefix="model.",
    released_name=released_name,
)
