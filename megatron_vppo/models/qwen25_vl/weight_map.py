"""Qwen2.5-VL: Hugging Face tensor names -> parameters of our Megatron modules.

Names are those of released checkpoints, which transformers 5 also writes and vLLM reads: `visual.*`, `model.*`,
`lm_head.weight`. What transformers 5 calls them in memory is translated by `to_released_name`.
"""

from __future__ import annotations

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from megatron_vppo.models.vision.weight_map import attention_entries, merger_entries, patch_entry, vision_entry
from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.kinds import Gated, Kind, Split, whole

_IN_MEMORY_PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}


def to_released_name(name: str) -> str:
    """Returns the released checkpoint's name of a tensor that transformers 5 names otherwise in memory."""
    for prefix, released in _IN_MEMORY_PREFIXES.items():
        if name.startswith(prefix):
            return released + name[len(prefix) :]
    return name


def vision_entries(vision: Qwen2_5_VLVisionConfig) -> list[Entry]:
    """Lists every parameter of the tower, in the order of the forward pass."""
    merger = "visual.merger."
    return [
        patch_entry(vision, hf="visual."),
        *(entry for layer in range(vision.depth) for entry in _layer(vision, layer)),
        vision_entry(
            "vision.merger.norm.weight", (f"{merger}ln_q.weight",), whole(vision.hidden_size), part="projector"
        ),
        *merger_entries(vision, ours="vision.merger.", fc1=f"{merger}mlp.0", fc2=f"{merger}mlp.2"),
    ]


def _layer(vision: Qwen2_5_VLVisionConfig, layer: int) -> list[Entry]:
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    hf, ours = f"visual.blocks.{layer}.", f"vision.blocks.layers.{layer}."

    def entry(name: str, hf_names: tuple[str, ...], kind: Kind) -> Entry:
        return vision_entry(ours + name, (hf + n for n in hf_names), kind)

    return [
        entry("input_layernorm.weight", ("norm1.weight",), whole(hidden)),
        *attention_entries(vision, ours=ours, hf=hf),
        entry("pre_mlp_layernorm.weight", ("norm2.weight",), whole(hidden)),
        entry(
            "mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Gated(ffn, (hidden,), padded=True)
        ),
        entry("mlp.linear_fc1.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), Gated(ffn, (), padded=True)),
        entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Split((hidden, ffn), 1, padded=True)),
        entry("mlp.linear_fc2.bias", ("mlp.down_proj.bias",), whole(hidden)),
    ]
