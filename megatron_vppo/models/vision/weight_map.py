"""Weight map of the parts that the vision towers of all families share.

`ours` and `hf` are prefixes: of our parameters and of the checkpoint's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.kinds import Kind, Replicated, Split, whole
from megatron_vppo.weights.qkv import FusedQKV


def vision_entry(ours: str, hf_names: Iterable[str], kind: Kind, *, part: ModelPart = "vision_tower") -> Entry:
    """Makes the entry of a parameter of the tower or its projector, which lie on the first pipeline stage."""
    return Entry(ours, tuple(hf_names), kind, "first", part=part)


def patch_entry(vision: Any, *, hf: str) -> Entry:
    """Makes the entry of the weight of the convolution over patches, which is a linear layer here."""
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    kind = Replicated(hf_shape=(vision.hidden_size, *kernel), shape=(vision.hidden_size, math.prod(kernel)))
    return vision_entry("vision.patch_embed.weight", (f"{hf}patch_embed.proj.weight",), kind)


def attention_entries(vision: Any, *, ours: str, hf: str) -> list[Entry]:
    """Makes the entries of the projections of a layer's attention."""
    hidden, heads = vision.hidden_size, vision.num_heads
    kinds: dict[tuple[str, str], Kind] = {
        ("linear_qkv.weight", "qkv.weight"): FusedQKV(heads, hidden // heads, (hidden,)),
        ("linear_qkv.bias", "qkv.bias"): FusedQKV(heads, hidden // heads, ()),
        ("linear_proj.weight", "proj.weight"): Split((hidden, hidden), 1),
        ("linear_proj.bias", "proj.bias"): whole(hidden),
    }
    return [
        vision_entry(f"{ours}self_attention.{name}", (f"{hf}attn.{hf_name}",), kind)
        for (name, hf_name), kind in kinds.items()
    ]


def merger_entries(vision: Any, *, ours: str, fc1: str, fc2: str) -> list[Entry]:
    """Makes the entries of the two linear layers of a merger; `fc1` and `fc2` are their names in the checkpoint."""
    merged, out = vision.hidden_size * vision.spatial_merge_size**2, vision.out_hidden_size
    kinds: dict[tuple[str, str], Kind] = {
        ("linear_fc1.weight", f"{fc1}.weight"): Split((merged, merged), 0),
        ("linear_fc1.bias", f"{fc1}.bias"): Split((merged,), 0),
        ("linear_fc2.weight", f"{fc2}.weight"): Split((out, merged), 1),
        ("linear_fc2.bias", f"{fc2}.bias"): whole(out),
    }
    return [vision_entry(ours + name, (hf_name,), kind, part="projector") for (name, hf_name), kind in kinds.items()]
