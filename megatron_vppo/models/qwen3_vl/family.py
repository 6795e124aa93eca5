"""Qwen3-VL (dense): what is its own."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch.nn.functional as F
from transformers import Qwen3VLConfig

from megatron_vppo.models.family import Family
from megatron_vppo.models.qwen3_vl.vision import VisionTower
from megatron_vppo.models.qwen3_vl.weight_map import canonical_name, weight_map

_VISION_ACTIVATION = "gelu_pytorch_tanh"


def check_supported(hf_config: Qwen3VLConfig) -> None:
    """Raises ValueError for what the architecture's configuration can say and no released model does."""
    text, vision = hf_config.text_config, hf_config.vision_config
    if text.rope_parameters["rope_type"] != "default" or vision.rope_parameters["rope_type"] != "axial":
        raise ValueError(
            f"rope types {text.rope_parameters['rope_type']!r} (text) and {vision.rope_parameters['rope_type']!r} "
            "(vision) are not supported; only 'default' and 'axial' are"
        )
    if text.attention_bias:
        raise ValueError("biases of the attention's projections are not supported; set attention_bias to false")
    if text.hidden_act != "silu" or vision.hidden_act != _VISION_ACTIVATION:
        raise ValueError(
            f"activations {text.hidden_act!r} (text) and {vision.hidden_act!r} (vision) are not supported; only "
            f"'silu' and {_VISION_ACTIVATION!r} are"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(f"vision features of width {vision.out_hidden_size} do not fit hidden size {text.hidden_size}")
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        raise ValueError(f"{vision.num_position_embeddings} position embeddings are no square grid")
    taps = list(vision.deepstack_visual_indexes)
    if taps != sorted(set(taps)) or (taps and not 0 <= taps[0] <= taps[-1] < vision.depth):
        raise ValueError(f"deepstack_visual_indexes {taps} must rise and lie below the tower's {vision.depth} layers")
    if len(taps) > text.num_hidden_layers:
        raise ValueError(f"{len(taps)} deepstack features for {text.num_hidden_layers} language layers")


def _vision_options(vision: Any) -> dict[str, Any]:
    return {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": functools.partial(F.gelu, approximate="tanh"),
    }


QWEN3_VL = Family(
    model_type="qwen3_vl",
    check_supported=check_supported,
    deepstack_layers=lambda hf_config: len(hf_config.vision_config.deepstack_visual_indexes),
    qkv_bias=False,
    qk_norm=True,
    interleaved_mrope=True,
    vision_options=_vision_options,
    vision_tower=VisionTower,
    weight_map=weight_map,
    canonical_name=canonical_name,
)
