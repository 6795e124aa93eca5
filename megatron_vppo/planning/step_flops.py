"""The arithmetic of a training step, from the sizes of a Qwen-VL.

One multiply-add is 2 FLOPs. Counted: matrix products of both towers, the vocabulary head, and attention (scores and
weighted values; causal attention at half the square, window attention at full windows). Not counted: norms, activation
functions, rotary embeddings, the optimizer. A forward pass is thus the familiar 2*N*tokens plus attention, where N is
the number of matrix parameters that a token passes through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vppo.models.hf_config import HfConfig, head_dim

BACKWARD = 2
"""The cost of a backward pass in forward passes: the gradients of inputs and of weights."""
HEAD_AGAIN = 1
"""The forward passes of the vocabulary head that its backward pass repeats, chunk by chunk."""


# --- A model ----------------------------------------------------------------------------------------------------------


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


# --- A step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepWork:
    """The work of one training step. Every prompt and every response has the mean length."""

    prompts: int
    """Trained prompts: data.rollout_batch_size."""
    responses: int
    """The responses to each prompt: rollout.n."""
    rounds: float
    """Rounds of sampling, of `prompts` prompts each."""
    minibatches: int
    """Optimizer steps."""
    prompt_tokens: int
    """Image tokens included."""
    response_tokens: int
    longest_response: int
    """The length limit of a response."""
    images: int
    """The images of each prompt."""
    patches: int
    """The patches of each image."""
    rows_per_update: int
    rows_per_scoring: int
    """Responses of a micro-batch."""
    perturbed_per_row: bool = True
    """True if each response has a perturbed image of its own, False if a group shares one."""
    shared_prefix: bool = False
    """True if the responses of a group that lie in one micro-batch share their prompt in each view that all of them
    show alike."""

    @property
    def rows(self) -> int:
        return self.prompts * self.responses

    @property
    def row_tokens(self) -> int:
        """The tokens that the model reads for one response. Nothing is predicted from the last token."""
        return self.prompt_tokens + self.response_tokens - 1


@dataclass(frozen=True)
class GroupFlops:
    """The forward work of one group in one phase, as it is packed."""

    language: float
    """FLOPs of the language model's layers."""
    attention: float
    """The part of `language` that is attention."""
    head: float
    """FLOPs of the vocabulary head, once."""
    tokens: float
    towers: int
    """Times that the vision tower runs on an image of the group."""
    tower: float
    """FLOPs of all of these together."""
    perturbed: int
    """Those of them that read a perturbed image."""


def images_flops(cost: ModelCost, work: StepWork) -> float:
    """Counts the forward FLOPs of the images of one prompt."""
    return work.images * cost.image(work.patches)


def scoring_of_group(cost: ModelCost, work: StepWork) -> GroupFlops:
    """Counts both views of a group. Each micro-batch that holds a part of the group reads its original images."""
    parts = micro_batches_of_group(work.responses, work.rows_per_scoring)
    original = _View(images=parts, prompts=parts if work.shared_prefix else work.responses)
    perturbed = _View(work.responses, work.responses) if work.perturbed_per_row else original
    return _packed(cost, work, original, perturbed)


def update_of_group(cost: ModelCost, work: StepWork) -> GroupFlops:
    """Counts one forward pass of a group. Each micro-batch that holds a part of the group reads its images."""
    parts = micro_batches_of_group(work.responses, work.rows_per_update)
    return _packed(cost, work, _View(images=parts, prompts=parts if work.shared_prefix else work.responses))


def micro_batches_of_group(responses: int, rows_each: int) -> int:
    """Counts the micro-batches over which a group is spread if groups begin with one."""
    return max(1, math.ceil(responses / rows_each))


@dataclass(frozen=True)
class _View:
    images: int
    """The times that the images of the prompt go through the tower."""
    prompts: int
    """The times that the prompt goes through the language model. All responses go through it once."""


def _packed(cost: ModelCost, work: StepWork, original: _View, perturbed: _View | None = None) -> GroupFlops:
    views = [original] if perturbed is None else [original, perturbed]
    prompts, rows = sum(view.prompts for view in views), len(views) * work.responses
    prompt, read = work.prompt_tokens, work.response_tokens - 1
    towers = sum(view.images for view in views)
    return GroupFlops(
        language=prompts * cost.sequence(prompt) + rows * cost.continuation(prompt, read),
        attention=cost.attention * (prompts * prompt**2 + rows * ((prompt + read) ** 2 - prompt**2)),
        head=rows * cost.per_head_position * work.response_tokens,
        tokens=prompts * prompt + rows * read,
        towers=towers * work.images,
        tower=towers * images_flops(cost, work),
        perturbed=0 if perturbed is None else perturbed.images * work.images,
    )


def least_update(cost: ModelCost, work: StepWork) -> float:
    """Counts the update's FLOPs with nothing computed twice and each image read once: the numerator of MFU."""
    rows = work.responses * (cost.sequence(work.row_tokens) + cost.per_head_position * work.response_tokens)
    return (1 + BACKWARD) * work.prompts * (rows + images_flops(cost, work))


def prefill_of_prompt(cost: ModelCost, work: StepWork) -> float:
    """Counts an engine's FLOPs to read one prompt; its responses share the keys and values."""
    return cost.sequence(work.prompt_tokens) + images_flops(cost, work)
