"""Responses made by hand, for tests of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vppo.algorithm.types import ImageRef, Prompt, Response

SMALL, LARGE = (1, 2, 4), (1, 4, 4)
"""Patches of two images, merged by 2 x 2: 2 and 4 features."""


def respond(prompt: Sequence[int], response: Sequence[int], *, images: Sequence[int] = (), group: int = 0) -> Response:
    """Makes a response to a prompt with these images: 0 is small, 1 is large."""
    return Response(
        prompt=Prompt(
            split="train",
            row=0,
            problem="",
            answer="",
            token_ids=tuple(prompt),
            compact_token_ids=(),
            images=tuple(ImageRef("train", image, 0) for image in images),
            grids_thw=tuple((SMALL, LARGE)[image] for image in images),
        ),
        group_id=group,
        sample=0,
        token_ids=tuple(response),
        rollout_logps=(0.0,) * len(response),
        finish_reason="stop",
        weight_version=0,
    )
