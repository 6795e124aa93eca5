"""Deepstack (Qwen3-VL): features from inside the vision tower, added to image tokens after the first language layers.

Shape suffix legend: T = tokens that the layers of this rank hold; I = image tokens among them; J = image tokens of the
embeddings before they are shared out over tensor-parallel ranks (sequence parallelism; I otherwise); h = width of the
language model.

Language layers may run again in the backward pass (recompute). What they read beside their inputs must then not lead
back into the vision tower: its graph would be walked once per layer, and is gone after the first. So layers read
leaves, and `prepare_deepstack` passes what the leaves have gathered on to the tower, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vppo.models.layers.sequences import Deepstack


def prepare_deepstack(
    hidden_T1h: Tensor,
    features_Jh: Sequence[Tensor],
    image_token_index_J: Tensor,
    *,
    shared_out: dist.ProcessGroup | None,
) -> tuple[Tensor, Deepstack | None]:
    """The embeddings, through which the features' gradients will go back, and what the layers add.

    Args:
        image_token_index_J: the features' rows in the embeddings before they were shared out.
        shared_out: the ranks that hold T tokens each, one after the other; None: this one holds all.
    """
    if not features_Jh:
        return hidden_T1h, None
    start = 0 if shared_out is None else shared_out.rank() * len(hidden_T1h)
    here_J = (image_token_index_J >= start) & (image_token_index_J < start + len(hidden_T1h))
    leaves = tuple(
        feature.detach()[here_J].requires_grad_(torch.is_grad_enabled() and feature.requires_grad)
        for feature in features_Jh
    )
    deepstack = Deepstack(leaves, image_token_index_J[here_J] - start)
    return _Collected.apply(hidden_T1h, leaves, here_J, shared_out, *features_Jh), deepstack


class _Collected(torch.autograd.Function):
    """Identity of the embeddings. All language layers lie behind it, so its backward runs when they are done, and the
    leaves hold their whole gradients (autograd fills leaves before anything else that is ready).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_T1h: Tensor,
        leaves: tuple[Tensor, ...],
        here_J: Tensor,
        shared_out: dist.ProcessGroup | None,
        *features_Jh: Tensor,
    ) -> Tensor:
        ctx.leaves, ctx.here_J, ctx.shared_out = leaves, here_J, shared_out
        return hidden_T1h.view_as(hidden_T1h)

    @staticmethod
    def backward(ctx: Any, grad_T1h: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.leaves[0].requires_grad:
            return grad_T1h, None, None, None, *(None for _ in ctx.leaves)
        gathered_SIh = torch.stack([leaf.grad for leaf in ctx.leaves])
        grad_SJh = gathered_SIh.new_zeros(len(ctx.leaves), len(ctx.here_J), gathered_SIh.shape[-1])
        grad_SJh[:, ctx.here_J] = gathered_SIh
        if ctx.shared_out is not None:
            dist.all_reduce(grad_SJh, group=ctx.shared_out)
        return grad_T1h, None, None, None, *grad_SJh.unbind(0)


class DeepstackLayer(TransformerLayer):
    """A language layer that adds its feature to the image tokens of its output."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden_T1h, context = super().forward(*args, **kwargs)
        deepstack: Deepstack | None = kwargs["packed_seq_params"].deepstack
        if deepstack is not None:
            feature_I1h = deepstack.features_Ih[self.layer_number - 1][:, None, :]
            hidden_T1h = hidden_T1h.index_add(0, deepstack.image_token_index_I, feature_I1h)
        return hidden_T1h, context
