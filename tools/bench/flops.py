"""The arithmetic that a training step cannot do without, from the sizes of a Qwen-VL.

One multiply-add is 2 FLOPs. Counted: matrix products of both towers, the vocabulary head, and attention (scores and
weighted values; causal attention at half the square, window attention at full windows). Not counted: norms, activation
functions, rotary embeddings, the optimizer. So a forward pass is the familiar 2*N*tokens, where N are the matrix
parameters that a token meets, plus attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BACKWARD = 2
"""Cost of a backward pass in forward passes: gradients of inputs and of weights."""


@dataclass(frozen=True)
class ModelCost:
    """Forward FLOPs by what they scale with."""

    per_token: int
    """Linear layers of the language model, without the head."""
    attention: int
    """Times the squared length of a sequence."""
    per_head_position: int
    """The vocabulary head at one position."""
    per_patch: int
    """Linear layers of the vision tower, the merger included."""
    full_attention: int
    """Times the squared number of patches of a picture: the vision layers that see all of it."""
    window_attention: int
    """Times patches of a picture: the vision layers that see one window of it."""

    def sequence(self, tokens: float) -> float:
        return self.per_token * tokens + self.attention * tokens**2

    def continuation(self, prompt: float, tokens: float) -> float:
        """`tokens` more after a prompt whose keys and values are kept."""
        return self.per_token * tokens + self.attention * ((prompt + tokens) ** 2 - prompt**2)

    def picture(self, patches: float) -> float:
        return (self.per_patch + self.window_attention) * patches + self.full_attention * patches**2


def model_cost(hf_config: Any) -> ModelCost:
    """From a transformers Qwen2_5_VLConfig or Qwen3VLConfig."""
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
    """How much one training step works on. Lengths are means over its responses."""

    sampled_groups: float
    """Prompts that were sampled, those dropped afterwards included."""
    trained_groups: float
    responses_per_group: int
    prompt_tokens: float
    response_tokens: float
    patches_per_prompt: float
    """Vision patches of all its pictures; taken as one picture in the attention terms."""
    views: int
    """Times that each response is scored: 2 with a perturbed view, 1 without."""
    perturbed_per_row: bool
    """Whether each response has a perturbed picture of its own, or all of a group share one."""
    epochs: int

    @property
    def sequence_tokens(self) -> float:
        """Tokens that the model reads to score one response: nothing is predicted from the last one."""
        return self.prompt_tokens + self.response_tokens - 1

    @property
    def trained_responses(self) -> float:
        return self.trained_groups * self.responses_per_group

    def phase_tokens(self) -> dict[str, float]:
        """gen: tokens generated. score: tokens read, every view. update_actor: tokens read, every epoch."""
        return {
            "gen": self.sampled_groups * self.responses_per_group * self.response_tokens,
            "score": self.views * self.trained_responses * self.sequence_tokens,
            "update_actor": self.epochs * self.trained_responses * self.sequence_tokens,
        }


def phase_flops(shape: StepShape, cost: ModelCost) -> dict[str, float]:
    """Least FLOPs of each phase of a step, on all ranks together.

    gen: a group's prompt and its picture are read once. score: a group's picture once, perturbed ones once each.
    update_actor: a group's picture once per epoch, no recomputation.
    """
    picture = cost.picture(shape.patches_per_prompt)
    head = cost.per_head_position * shape.response_tokens
    response = cost.sequence(shape.sequence_tokens) + head
    continuation = cost.continuation(shape.prompt_tokens, shape.response_tokens - 1) + head
    prefill = cost.sequence(shape.prompt_tokens) + picture
    perturbed_pictures = shape.trained_responses if shape.perturbed_per_row else shape.trained_groups
    return {
        "gen": shape.sampled_groups * (prefill + shape.responses_per_group * continuation),
        "score": shape.views * shape.trained_responses * response
        + (shape.trained_groups + (shape.views - 1) * perturbed_pictures) * picture,
        "update_actor": shape.epochs
        * (1 + BACKWARD)
        * (shape.trained_responses * response + shape.trained_groups * picture),
    }


@dataclass(frozen=True)
class GroupShape:
    """One prompt with one picture, and the answers to it."""

    prompt_tokens: int
    patches: int
    response_tokens: tuple[int, ...]

    @property
    def sequence_tokens(self) -> tuple[int, ...]:
        """Tokens that the model reads for each answer: nothing is predicted from the last one."""
        return tuple(self.prompt_tokens + response - 1 for response in self.response_tokens)


def scoring_flops(groups: Sequence[GroupShape], cost: ModelCost) -> float:
    """Least FLOPs of scoring all answers in two views, with exact lengths: a group's picture once as it is, and once
    perturbed for each answer; the head on response positions of both views.
    """
    perturbed = sum(len(group.response_tokens) * cost.picture(group.patches) for group in groups)
    return 2 * _rows_flops(groups, cost) + sum(cost.picture(group.patches) for group in groups) + perturbed


def update_flops(groups: Sequence[GroupShape], cost: ModelCost) -> float:
    """Least FLOPs of forward and backward over all answers, a group's picture once; nothing is computed twice."""
    pictures = sum(cost.picture(group.patches) for group in groups)
    return (1 + BACKWARD) * (_rows_flops(groups, cost) + pictures)


def _rows_flops(groups: Sequence[GroupShape], cost: ModelCost) -> float:
    """Forward, one view: the language model over every answer, the head where response tokens are predicted."""
    return sum(
        cost.sequence(tokens) + cost.per_head_position * response
        for group in groups
        for tokens, response in zip(group.sequence_tokens, group.response_tokens, strict=True)
    )
