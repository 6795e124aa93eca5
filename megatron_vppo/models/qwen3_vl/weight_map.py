"""Qwen3-VL: Hugging Face tensor names -> parameters of our Megatron modules.

Names are those of released checkpoints, which are also what transformers calls them in memory: `model.visual.*`,
`model.language_model.*`, `lm_head.weight`.
"""

from __future__ import annotations

import itertools

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from megatron_vppo.models.qwen3_vl.vision import segment_lengths
from megatron_vppo.models.vision.weight_map import attention_entries, merger_entries, patch_entry, vision_entry
from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.kinds import Kind, Split, whole


def vision_entries(vision: Qwen3VLVisionConfig) -> list[Entry]:
    """Lists every parameter of the tower."""
    hidden, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    positions = whole(vision.num_position_embeddings, hidden)
    entries = [
        patch_entry(vision, hf="model.visual."),
        vision_entry("vision.patch_embed.bias", ("model.visual.patch_embed.proj.bias",), whole(hidden)),
        vision_entry("vision.position_grid", ("model.visual.pos_embed.weight",), positions),
    ]
    numbers = itertools.count()
    for segment, length in enumerate(segment_lengths(vision)):
        for within in range(length):
            ours = f"vision.segment_{segment}.layers.{within}."
            entries += _layer(vision, ours=ours, hf=f"model.visual.blocks.{next(numbers)}.")
    for tap in range(len(vision.deepstack_visual_indexes)):
        hf = f"model.visual.deepstack_merger_list.{tap}."
        entries += _merger(vision, ours=f"vision.deepstack_merger_{tap}.", hf=hf, normed=merged)
    return entries + _merger(vision, ours="vision.merger.", hf="model.visual.merger.", normed=hidden)


def _merger(vision: Qwen3VLVisionConfig, *, ours: str, hf: str, normed: int) -> list[Entry]:
    return [
        vision_entry(f"{ours}norm.weight", (f"{hf}norm.weight",), whole(normed), part="projector"),
        vision_entry(f"{ours}norm.bias", (f"{hf}norm.bias",), whole(normed), part="projector"),
        *merger_entries(vision, ours=ours, fc1=f"{hf}linear_fc1", fc2=f"{hf}linear_fc2"),
    ]


def _layer(vision: Qwen3VLVisionConfig, *, ours: str, hf: str) -> list[Entry]:
    hidden, ffn = vision.hidden_size, vision.intermediate_size

    def entry(name: str, hf_name: str, kind: Kind) -> Entry:
        return vision_entry(ours + name, (hf + hf_name,), kind)

    return [
        entry("input_layernorm.weight", "norm1.weight", whole(hidden)),
        entry("input_layernorm.bias", "norm1.bias", whole(hidden)),
        *attention_entries(vision, ours=ours, hf=hf),
        entry("pre_mlp_layernorm.weight", "norm2.weight", whole(hidden)),
        entry("pre_mlp_layernorm.bias", "norm2.bias", whole(hidden)),
        entry("mlp.linear_fc1.weight", "mlp.linear_fc1.weight", Split((ffn, hidden), 0, padded=True)),
        entry("mlp.linear_fc1.bias", "mlp.linear_fc1.bias", Split((ffn,), 0, padded=True)),
        entry("mlp.linear_fc2.weight", "mlp.linear_fc2.weight", Split((hidden, ffn), 1, padded=True)),
        entry("mlp.linear_fc2.bias", "mlp.linear_fc2.bias", whole(hidden)),
    ]
