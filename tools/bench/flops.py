"""The least arithmetic of a training step, from the sizes of a Qwen-VL.

One multiply-add is 2 FLOPs. Counted: matrix products of both towers, the vocabulary head, and attention (scores and
weighted values; causal attention at half the square, window attention at full windows). Not counted: norms, activation
functions, rotary embeddings, the optimizer. A forward pass is thus the familiar 2*N*tokens plus attention, where N is
the number of matrix parameters that a token passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BACKWARD = 2
"""The cost of a backward pass in forward passes: the gradients of inputs and of weights."""


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


def model_cost(hf_config: Any) -> ModelCost:
    """Counts the FLOPs of a model, from a Qwen2_5_VLConfig or Qwen3VLConfig of transformers."""
    text, vision = hf_config.text_config, hf_config.vision_config
    is_qwen3 = hf_config.model_type == "qwen3_vl"
    head_dim = text.head_dim if is_qwen3 else text.hidden_size // text.num_attention_heads
    attention_matrices = 2 * text.hidden_size * (text.num_attention_heads + text.num_key_value_heads) * head_dim
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
        attention=2 * text.num_hidden_layers * text.num_attention_heads * head_dim,
        per_head_position=2 * text.vocab_size * text.hidden_size,
        per_patch=int(2 * (vision.depth * block + patch_values * vision.hidden_size + merger)),
        full_attention=4 * full_layers * vision.hidden_size,
        window_attention=4 * (vision.depth - full_layers) * vision.hidden_size * window_patches,
    )


@dataclass(frozen=True)
class StepShape:
    """The amount of work of one training step. Lengths are means over its responses."""

    sampled_groups: float
    """The sampled prompts, including those whose groups were dropped."""
    trained_groups: float
    responses_per_group: int
    prompt_tokens: float
    response_tokens: float
    patches_per_prompt: float
    """The patches of all images of a prompt, which the attention terms take for one image."""
    views: int
    """The number of times that each response is scored: 2 with a perturbed view, 1 without."""
    perturbed_per_row: bool
    """True if each response has a perturbed image of its own, False if a group shares one."""
    epochs: int

    @property
    def sequence_tokens(self) -> float:
        """The tokens that the model reads to score one response. Nothing is predicted from the last token."""
        return self.prompt_tokens + self.response_tokens - 1

    @property
    def trained_responses(self) -> float:
        return self.trained_groups * self.responses_per_group

    def phase_tokens(self) -> dict[str, float]:
        """Counts tokens: generated in gen; read in score, over all views; read in update_actor, over all epochs."""
        return {
            "gen": self.sampled_groups * self.responses_per_group * self.response_tokens,
            "score": self.views * self.trained_responses * self.sequence_tokens,
            "update_actor": self.epochs * self.trained_responses * self.sequence_tokens,
        }


def phase_flops(shape: StepShape, cost: ModelCost) -> dict[str, float]:
    """Counts the least FLOPs of each phase of a step, over all ranks.

    gen: a group's prompt and image are read once. score: a group's image counts once, and each perturbed image once.
    update_actor: a group's image counts once per epoch, and nothing is recomputed.
    """
    image = cost.image(shape.patches_per_prompt)
    head = cost.per_head_position * shape.response_tokens
    response = cost.sequence(shape.sequence_tokens) + head
    continuation = cost.continuation(shape.prompt_tokens, shape.response_tokens - 1) + head
    prefill = cost.sequence(shape.prompt_tokens) + image
    perturbed_images = shape.trained_responses if shape.perturbed_per_row else shape.trained_groups
    return {
        "gen": shape.sampled_groups * (prefill + shape.responses_per_group * continuation),
        "score": shape.views * shape.trained_responses * response
        + (shape.trained_groups + (shape.views - 1) * perturbed_images) * image,
        "update_actor": shape.epochs
        * (1 + BACKWARD)
        * (shape.trained_responses * response + shape.trained_groups * image),
    }


@dataclass(frozen=True)
class GroupShape:
    """One prompt with one image, and its responses."""

    prompt_tokens: int
    patches: int
    response_tokens: tuple[int, ...]

    @property
    def sequence_tokens(self) -> tuple[int, ...]:
        """The tokens that the model reads for each response. Nothing is predicted from the last token."""
        return tuple(self.prompt_tokens + response - 1 for response in self.response_tokens)


def scoring_flops(groups: Sequence[GroupShape], cost: ModelCost) -> float:
    """Counts the least FLOPs of scoring all responses in two views, with exact lengths.

    A group's original image counts once, and a perturbed one for each response. The head runs on the response positions
    of both views.
    """
    perturbed = sum(len(group.response_tokens) * cost.image(group.patches) for group in groups)
    return 2 * _rows_flops(groups, cost) + sum(cost.image(group.patches) for group in groups) + perturbed


def update_flops(groups: Sequence[GroupShape], cost: ModelCost) -> float:
    """Counts the least FLOPs of forward and backward over all responses. A group's image counts once."""
    images = sum(cost.image(group.patches) for group in groups)
    return (1 + BACKWARD) * (_rows_flops(groups, cost) + images)


def _rows_flops(groups: Sequence[GroupShape], cost: ModelCost) -> float:
    """Counts the forward FLOPs of a view: the language model on every sequence, the head on response positions."""
    return sum(
        cost.sequence(tokens) + cost.per_head_position * response
        for group in groups
        for tokens, response in zip(group.sequence_tokens, group.response_tokens, strict=True)
    )
