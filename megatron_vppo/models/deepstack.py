"""Deepstack (Qwen3-VL): features from inside the vision tower, added to image tokens after the first language layers.

Shape suffix legend: T = tokens of all packed sequences; I = image tokens; h = width of the language model.

Language layers may run again in the backward pass (recompute). What they read beside their inputs must then not lead
back into the vision tower: its graph would be walked once per layer, and is gone after the first. So layers read
leaves, and `attach` passes what the leaves have gathered on to the tower, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


@dataclass(frozen=True)
class Deepstack:
    features_Ih: tuple[Tensor, ...]
    """One per language layer, from the first on; leaves of the graph."""
    image_token_index_I: Tensor
    """int64; the rows of T that they are added to."""


def attach(
    hidden_T1h: Tensor, features_Ih: Sequence[Tensor], image_token_index_I: Tensor
) -> tuple[Tensor, Deepstack | None]:
    """The embeddings, through which the features' gradients will go back, and what the layers add."""
    if not features_Ih:
        return hidden_T1h, None
    leaves = tuple(feature.detach().requires_grad_(torch.is_grad_enabled()) for feature in features_Ih)
    return _Collected.apply(hidden_T1h, leaves, *features_Ih), Deepstack(leaves, image_token_index_I)


class _Collected(torch.autograd.Function):
    """Identity of the embeddings. All language layers lie behind it, so its backward runs when they are done, and the
    leaves hold their whole gradients (autograd fills leaves before anything else that is ready).
    """

    @staticmethod
    def forward(ctx: Any, hidden_T1h: Tensor, leaves: tuple[Tensor, ...], *features_Ih: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden_T1h.view_as(hidden_T1h)

    @staticmethod
    def backward(ctx: Any, grad_T1h: Tensor) -> tuple[Tensor | None, ...]:
        return grad_T1h, None, *(leaf.grad for leaf in ctx.leaves)


class DeepstackLayer(TransformerLayer):
    """A language layer that adds its feature to the image tokens of its output."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden_T1h, context = super().forward(*args, **kwargs)
        deepstack: Deepstack | None = kwargs["packed_seq_params"].deepstack
        if deepstack is not None:
            feature_I1h = deepstack.features_Ih[self.layer_number - 1][:, None, :]
            hidden_T1h = hidden_T1h.index_add(0, deepstack.image_token_index_I, feature_I1h)
        return hidden_T1h, context
