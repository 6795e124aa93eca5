"""Qwen2.5-VL: Hugging Face tensor names -> parameters of our Megatron modules.

Names are those of released checkpoints, which transformers 5 also writes and vLLM reads: `visual.*`, `model.*`,
`lm_head.weight`. What transformers 5 calls them in memory is translated by `canonical_name`.
"""

from __future__ import annotations

import math

from transformers import Qwen2_5_VLConfig

from megatron_vppo.models.language_map import language_entries, whole
from megatron_vppo.models.weight_map import Entry, FusedQKV, Gated, Kind, Replicated, Split

_IN_MEMORY_PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}


def canonical_name(name: str) -> str:
    """The released checkpoint's name of a tensor that transformers 5 names otherwise in memory."""
    for prefix, released in _IN_MEMORY_PREFIXES.items():
        if name.startswith(prefix):
            return released + name[len(prefix) :]
    return name


def weight_map(hf_config: Qwen2_5_VLConfig) -> tuple[Entry, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    language = language_entries(hf_config, prefix="model.", qkv_bias=True, qk_norm=False)
    return (*_vision_entries(hf_config), *language)


def _vision_entries(hf_config: Qwen2_5_VLConfig) -> list[Entry]:
    vision = hf_config.vision_config
    hidden = vision.hidden_size
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patch = Replicated(hf_shape=(hidden, *kernel), shape=(hidden, math.prod(kernel)))
    entries = [Entry("vision.patch_embed.weight", ("visual.patch_embed.proj.weight",), patch, "first")]
    for layer in range(vision.depth):
        entries += _vision_layer(hf_config, layer)
    merged, out = hidden * vision.spatial_merge_size**2, vision.out_hidden_size
    merger: dict[str, tuple[str, Kind]] = {
        "norm.weight": ("ln_q.weight", whole(hidden)),
        "linear_fc1.weight": ("mlp.0.weight", Split((merged, merged), 0)),
        "linear_fc1.bias": ("mlp.0.bias", Split((merged,), 0)),
        "linear_fc2.weight": ("mlp.2.weight", Split((out, merged), 1)),
        "linear_fc2.bias": ("mlp.2.bias", whole(out)),
    }
    return entries + [
        Entry(f"vision.merger.{ours}", (f"visual.merger.{hf}",), kind, "first") for ours, (hf, kind) in merger.items()
    ]


def _vision_layer(hf_config: Qwen2_5_VLConfig, layer: int) -> list[Entry]:
    vision = hf_config.vision_config
    hidden, ffn, heads = vision.hidden_size, vision.intermediate_size, vision.num_heads
    hf, ours = f"visual.blocks.{layer}.", "vision.blocks.layers.{}."

    def entry(name: str, hf_names: tuple[str, ...], kind: Kind) -> Entry:
        return Entry(ours + name, tuple(hf + n for n in hf_names), kind, "first", layer)

    def qkv(tail: tuple[int, ...]) -> FusedQKV:
        return FusedQKV(heads, hidden // heads, tail)

    return [
        entry("input_layernorm.weight", ("norm1.weight",), whole(hidden)),
        entry("self_attention.linear_qkv.weight", ("attn.qkv.weight",), qkv((hidden,))),
        entry("self_attention.linear_qkv.bias", ("attn.qkv.bias",), qkv(())),
        entry("self_attention.linear_proj.weight", ("attn.proj.weight",), Split((hidden, hidden), 1)),
        entry("self_attention.linear_proj.bias", ("attn.proj.bias",), whole(hidden)),
        entry("pre_mlp_layernorm.weight", ("norm2.weight",), whole(hidden)),
        entry("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Gated(ffn, (hidden,))),
        entry("mlp.linear_fc1.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), Gated(ffn, ())),
        entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Split((hidden, ffn), 1)),
        entry("mlp.linear_fc2.bias", ("mlp.down_proj.bias",), whole(hidden)),
    ]
