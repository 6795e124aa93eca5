"""The least arithmetic of a training step, with which what is measured is compared.

`megatron_vppo/models/flops.py` counts the FLOPs of a model and says what is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vppo.models.flops import ModelCost
from megatron_vppo.planning.step_flops import BACKWARD


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
    perturbations: int
    """The perturbed copies of a prompt's images: one for each response, or fewer that they share."""
    epochs: int
    shared_prefix: bool
    """True if the responses of a group share their prompt in every view that they have in common."""
    updated_views: int = 1
    """The number of views of each response that the update reads."""

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
            "update_actor": self.epochs * self.updated_views * self.trained_responses * self.sequence_tokens,
        }


def phase_flops(shape: StepShape, cost: ModelCost) -> dict[str, float]:
    """Counts the least FLOPs of each phase of a step, over all ranks.

    gen: a group's prompt and image are read once. score: a group's image counts once, and each perturbed image once.
    update_actor: the same once per epoch, and nothing is recomputed. Without shared prompts each response is read with
    its own in score and update_actor.
    """
    image = cost.image(shape.patches_per_prompt)
    prompt = cost.sequence(shape.prompt_tokens)
    head = cost.per_head_position * shape.response_tokens
    continuations = shape.responses_per_group * (
        cost.continuation(shape.prompt_tokens, shape.response_tokens - 1) + head
    )

    def view(kinds: int) -> float:
        """Counts a view of a group in which its images are perturbed in `kinds` ways."""
        prompts = kinds if shape.shared_prefix else shape.responses_per_group
        return prompts * prompt + kinds * image + continuations

    def read(views: int) -> float:
        return view(1) + (views - 1) * view(shape.perturbations)

    return {
        "gen": shape.sampled_groups * (prompt + image + continuations),
        "score": shape.trained_groups * read(shape.views),
        "update_actor": shape.epochs * (1 + BACKWARD) * shape.trained_groups * read(shape.updated_views),
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
