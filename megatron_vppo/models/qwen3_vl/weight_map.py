"""Qwen3-VL: Hugging Face tensor names -> parameters of our Megatron modules.

Names are those of released checkpoints, which are also what transformers calls them in memory: `model.visual.*`,
`model.language_model.*`, `lm_head.weight`.
"""

from __future__ import annotations

import math

from transformers import Qwen3VLConfig

from megatron_vppo.models.language_map import language_entries, whole
from megatron_vppo.models.qwen3_vl.vision import segment_lengths
from megatron_vppo.models.weight_map import Entry, FusedQKV, Kind, Replicated, Split


def canonical_name(name: str) -> str:
    """Names are the same everywhere."""
    return name


def weight_map(hf_config: Qwen3VLConfig) -> tuple[Entry, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    language = language_entries(hf_config, prefix="model.language_model.", qkv_bias=False, qk_norm=True)
    return (*_vision_entries(hf_config), *language)


def _vision_entries(hf_config: Qwen3VLConfig) -> list[Entry]:
    vision = hf_config.vision_config
    hidden = vision.hidden_size
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patch = Replicated(hf_shape=(hidden, *kernel), shape=(hidden, math.prod(kernel)))
    entries = [
        _outside_layers("patch_embed.weight", "patch_embed.proj.weight", patch),
        _outside_layers("patch_embed.bias", "patch_embed.proj.bias", whole(hidden)),
        _outside_layers("position_grid", "pos_embed.weight", whole(vision.num_position_embeddings, hidden)),
    ]
    layer = 0
    for segment, length in enumerate(segment_lengths(vision)):
        for within in range(length):
            entries += _vision_layer(hf_config, layer, ours=f"vision.segment_{segment}.layers.{within}.")
            layer += 1
    for tap in range(len(vision.deepstack_visual_indexes)):
        entries += _merger(hf_config, f"deepstack_merger_{tap}.", f"deepstack_merger_list.{tap}.", over_block=True)
    return entries + _merger(hf_config, "merger.", "merger.", over_block=False)


def _outside_layers(ours: str, hf: str, kind: Kind) -> Entry:
    return Entry(f"vision.{ours}", (f"model.visual.{hf}",), kind, "first")


def _merger(hf_config: Qwen3VLConfig, ours: str, hf: str, *, over_block: bool) -> list[Entry]:
    vision = hf_config.vision_config
    merged, out = vision.hidden_size * vision.spatial_merge_size**2, vision.out_hidden_size
    normed = merged if over_block else vision.hidden_size
    kinds: dict[str, Kind] = {
        "norm.weight": whole(normed),
        "norm.bias": whole(normed),
        "linear_fc1.weight": Split((merged, merged), 0),
        "linear_fc1.bias": Split((merged,), 0),
        "linear_fc2.weight": Split((out, merged), 1),
        "linear_fc2.bias": whole(out),
    }
    return [_outside_layers(ours + name, hf + name, kind) for name, kind in kinds.items()]


def _vision_layer(hf_config: Qwen3VLConfig, layer: int, *, ours: str) -> list[Entry]:
    vision = hf_config.vision_config
    hidden, ffn, heads = vision.hidden_size, vision.intermediate_size, vision.num_heads

    def entry(name: str, hf_name: str, kind: Kind) -> Entry:
        return Entry(ours + name, (f"model.visual.blocks.{layer}.{hf_name}",), kind, "first")

    def qkv(tail: tuple[int, ...]) -> FusedQKV:
        return FusedQKV(heads, hidden // heads, tail)

    return [
        entry("input_layernorm.weight", "norm1.weight", whole(hidden)),
        entry("input_layernorm.bias", "norm1.bias", whole(hidden)),
        entry("self_attention.linear_qkv.weight", "attn.qkv.weight", qkv((hidden,))),
        entry("self_attention.linear_qkv.bias", "attn.qkv.bias", qkv(())),
        entry("self_attention.linear_proj.weight", "attn.proj.weight", Split((hidden, hidden), 1)),
        entry("self_attention.linear_proj.bias", "attn.proj.bias", whole(hidden)),
        entry("pre_mlp_layernorm.weight", "norm2.weight", whole(hidden)),
        entry("pre_mlp_layernorm.bias", "norm2.bias", whole(hidden)),
        entry("mlp.linear_fc1.weight", "mlp.linear_fc1.weight", Split((ffn, hidden), 0)),
        entry("mlp.linear_fc1.bias", "mlp.linear_fc1.bias", Split((ffn,), 0)),
        entry("mlp.linear_fc2.weight", "mlp.linear_fc2.weight", Split((hidden, ffn), 1)),
        entry("mlp.linear_fc2.bias", "mlp.linear_fc2.bias", whole(hidden)),
    ]
