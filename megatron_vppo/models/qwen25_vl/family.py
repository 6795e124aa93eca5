"""Qwen2.5-VL: what is its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig

from megatron_vppo.models.family import Family
from megatron_vppo.models.qwen25_vl.vision import VisionTower
from megatron_vppo.models.qwen25_vl.weight_map import canonical_name, weight_map


def check_supported(hf_config: Qwen2_5_VLConfig) -> None:
    """Raises ValueError for what the architecture's configuration can say and no released model does."""
    text, vision = hf_config.text_config, hf_config.vision_config
    if text.rope_parameters["rope_type"] != "default" or vision.rope_parameters["rope_type"] != "axial":
        raise ValueError(
            f"rope types {text.rope_parameters['rope_type']!r} (text) and {vision.rope_parameters['rope_type']!r} "
            "(vision) are not supported; only 'default' and 'axial' are"
        )
    if any(kind != "full_attention" for kind in text.layer_types):
        raise ValueError("sliding window attention is not supported; set use_sliding_window to false")
    if text.hidden_act != "silu" or vision.hidden_act != "silu":
        raise ValueError(f"activations {text.hidden_act!r} and {vision.hidden_act!r} are not supported; only 'silu' is")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(f"vision features of width {vision.out_hidden_size} do not fit hidden size {text.hidden_size}")


def _vision_options(vision: Any) -> dict[str, Any]:
    return {"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu}


QWEN25_VL = Family(
    model_type="qwen2_5_vl",
    check_supported=check_supported,
    deepstack_layers=lambda hf_config: 0,
    qkv_bias=True,
    qk_norm=False,
    interleaved_mrope=False,
    vision_options=_vision_options,
    vision_tower=VisionTower,
    weight_map=weight_map,
    canonical_name=canonical_name,
)
