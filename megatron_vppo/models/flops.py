"""The arithmetic of a Qwen-VL, from its sizes.

One multiply-add is 2 FLOPs. Counted: matrix products of both towers, the vocabulary head, and attention (scores and
weighted values; causal attention at half the square, window attention at full windows). Not counted: norms, activation
functions, rotary embeddings, the optimizer. A forward pass is thus the familiar 2*N*tokens plus attention, where N is
the number of matrix parameters that a token passes through.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.models.hf_config import HfConfig, head_dim


@dataclass(frozen=True)
class ModelCost:
    """Forward FLOPs, one field for each quantity that they scale with."""

    per_token: int
    """The linear layers of the language model for one token, without the head."""
    attention: int
    """A factor of the squared length of a sequence: the language model's attention."""
    per_head_position: int
    """The vocabulary head at one position."""
    per_patch: int
    """The linear layers of the vision tower for one patch, the merger included."""
    full_attention: int
    """A factor of the squared number of patches of an image: the vision layers with full attention."""
    window_attention: int
    """A factor of the number of patches of an image: the vision layers with window attention."""

    def sequence(self, tokens: float) -> float:
        return self.per_token * tokens + self.attention * tokens**2

    def continuation(self, prompt: float, tokens: float) -> float:
        """Counts the FLOPs of `tokens` more after a prompt whose keys and values are cached."""
        return self.per_token * tokens + self.attention * ((prompt + tokens) ** 2 - prompt**2)

    def image(self, patches: float) -> float:
        return (self.per_patch + self.window_attention) * patches + self.full_attention * patches**2


def model_cost(hf_config: HfConfig) -> ModelCost:
    """Counts the FLOPs of a model, from a Qwen2_5_VLConfig or Qwen3VLConfig of transformers."""
    text, vision = hf_config.text_config, hf_config.vision_config
    is_qwen3 = hf_config.model_type == "qwen3_vl"
    attention_matrices = 2 * text.hidden_size * (text.num_attention_heads + text.num_key_value_heads) * head_dim(text)
    language = text.num_hidden_layers * (attention_matrices + 3 * text.hidden_size * text.intermediate_size)

    merged_width = vision.hidden_size * vision.spatial_merge_size**2
    mergers = 1 + len(vision.deepstack_visual_indexes) if is_qwen3 else 1
    merger = mergers * merged_width * (merged_width + vision.out_hidden_size) / vision.spatial_merge_size**2
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    mlp_matrices = 2 if is_qwen3 else 3
    block = 4 * vision.hidden_size**2 + mlp_matrices * vision.hidden_size * vision.intermediate_size
    window_patches = 0 if is_qwen3 else (vision.window_size // vision.patch_size) ** 2
    full_layers = vision.depth if is_qwen3 else len(vision.fullatt_block_indexes)
    return ModelCost(
        per_token=2 * language,
        attention=2 * text.num_hidden_layers * text.num_attention_heads * head_dim(text),
        per_head_position=2 * text.vocab_size * text.hidden_size,
        per_patch=int(2 * (vision.depth * block + patch_values * vision.hidden_size + merger)),
        full_attention=4 * full_layers * vision.hidden_size,
        window_attention=4 * (vision.depth - full_layers) * vision.hidden_size * window_patches,
    )
