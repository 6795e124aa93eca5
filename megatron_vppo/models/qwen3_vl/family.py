"""Qwen3-VL (dense): the parts that the families do not share."""

from __future__ import annotations

import functools
import math

import torch.nn.functional as F
from transformers import Qwen3VLConfig

from megatron_vppo.models.family import Family
from megatron_vppo.models.language.mrope import interleaved_mrope, mrope_position_fn
from megatron_vppo.models.qwen3_vl.vision import Qwen3VisionTower
from megatron_vppo.models.qwen3_vl.weight_map import vision_entries


def _check(hf_config: Qwen3VLConfig) -> None:
    text, vision = hf_config.text_config, hf_config.vision_config
    if text.attention_bias:
        raise ValueError("biases of the attention's projections are not supported; set attention_bias to false")
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        raise ValueError(f"{vision.num_position_embeddings} position embeddings do not form a square grid")
    taps = list(vision.deepstack_visual_indexes)
    if taps != sorted(set(taps)) or (taps and not 0 <= taps[0] <= taps[-1] < vision.depth):
        raise ValueError(f"deepstack_visual_indexes {taps} must rise and lie below the tower's {vision.depth} layers")


QWEN3_VL = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    check_own=_check,
    deepstack_layers=lambda hf_config: len(hf_config.vision_config.deepstack_visual_indexes),
    qkv_bias=False,
    qk_norm=True,
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
    positions=mrope_position_fn,
    rotary=interleaved_mrope,
    vision_activation="gelu_pytorch_tanh",
    vision_options={
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": functools.partial(F.gelu, approximate="tanh"),
    },
    vision_tower=Qwen3VisionTower,
    vision_entries=vision_entries,
    language_prefix="model.language_model.",
    to_released_name=lambda name: name,  # transformers uses the released names
)
