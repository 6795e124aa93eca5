"""The arithmetic of a training step, from that of its model (`models/flops.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vppo.models.flops import ModelCost

BACKWARD = 2
"""The cost of a backward pass in forward passes: the gradients of inputs and of weights."""
HEAD_AGAIN = 1
"""The forward passes of the vocabulary head that its backward pass repeats, chunk by chunk."""


@dataclass(frozen=True)
class StepWork:
    """The work of one training step. Every prompt and every response has the mean length."""

    prompts: int
    """Trained prompts: data.rollout_batch_size."""
    responses: int
    """The responses to each prompt: rollout.n."""
    drawn: float
    """Prompts that are sampled for each one that is trained on, all in one draw."""
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
    scores_both_views: bool = True
    updates_both_views: bool = False
    """True if the perturbed view is read in scoring, and in the update."""

    @property
    def rows(self) -> int:
        return self.prompts * self.responses


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
    """Counts the views of a group. Each micro-batch that holds a part of the group reads its prompt; the tower runs on
    an image in the first of them.
    """
    parts = micro_batches_of_group(work.responses, work.rows_per_scoring)
    return _packed(cost, work, *_views(work, parts, both=work.scores_both_views))


def update_of_group(cost: ModelCost, work: StepWork) -> GroupFlops:
    """Counts one forward pass of a group, in parts as in scoring."""
    parts = micro_batches_of_group(work.responses, work.rows_per_update)
    return _packed(cost, work, *_views(work, parts, both=work.updates_both_views))


def micro_batches_of_group(responses: int, rows_each: int) -> int:
    """Counts the micro-batches over which a group is spread if groups begin with one."""
    return max(1, math.ceil(responses / rows_each))


@dataclass(frozen=True)
class _View:
    images: int
    """The times that the images of the prompt go through the tower."""
    prompts: int
    """The times that the prompt goes through the language model. All responses go through it once."""


def _views(work: StepWork, parts: int, *, both: bool) -> list[_View]:
    """Lists the views of a group that lies in `parts` micro-batches: the original one, or both."""
    original = _View(images=1, prompts=parts if work.shared_prefix else work.responses)
    perturbed = _View(work.responses, work.responses) if work.perturbed_per_row else original
    return [original, perturbed] if both else [original]


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
    """Counts the update's FLOPs with nothing computed twice and each image read once: the numerator of MFU.

    A prompt counts once if responses share it, else for each of them; in the perturbed view, too, if it is read.
    """
    once = _packed(cost, work, *_views(work, 1, both=work.updates_both_views))
    return (1 + BACKWARD) * work.prompts * (once.language + once.head + once.tower)


def prefill_of_prompt(cost: ModelCost, work: StepWork) -> float:
    """Counts an engine's FLOPs to read one prompt; its responses share the keys and values."""
    return cost.sequence(work.prompt_tokens) + images_flops(cost, work)
