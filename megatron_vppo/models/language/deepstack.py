"""Deepstack (Qwen3-VL): features from inside the vision tower, added to image tokens after the first language layers.

Shape suffix legend: S = tokens that this rank holds between layers; W = image tokens among S; J = image tokens among
the tokens of this context-parallel rank (without sequence parallelism J and W are the same); O = outputs of the vision
tower that are deepstack features, one per layer that adds one; h = hidden size of the language model.

No layer may read a tensor that is connected to the vision tower. A layer that runs again in the backward pass
(recompute) calls backward by itself; it would walk through the tower's graph, which is freed after the first walk. So
the layers read detached ones that are leaves of the graph, and the embeddings carry the connection:

    embeddings -------------------> _CollectLeafGradients ---> language layers ---> loss
                                      ^                          ^  ^  ^
    vision tower ---> features_Jh ----+                          |  |  |
                           |                                     |  |  |
                           +--- detached, this rank's part ---> leaves_Wh

In the backward pass the layers run first and leave their gradients in `leaf.grad`. The gradient of the embeddings comes
last, when all layers are done: there the leaves' gradients are put back among J and go on to the tower, once.
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
    hidden_S1h: Tensor,
    features_Jh: Sequence[Tensor],
    *,
    held: slice,
    image_token_index_W: Tensor,
    sequence_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Deepstack]:
    """Returns the embeddings, connected so that the features' gradients go back through them, and the layers' leaves.

    Args:
        features_Jh: one tensor per language layer that adds one.
        held: the image tokens among J that this rank holds between layers.
        image_token_index_W: int64; their places in S.
        sequence_group: the tensor-parallel ranks that hold S of these tokens each, one rank after the other; None: this
            rank holds all.
    """
    leaves = tuple(
        feature.detach()[held].requires_grad_(torch.is_grad_enabled() and feature.requires_grad)
        for feature in features_Jh
    )
    deepstack = Deepstack(leaves, image_token_index_W)
    return _CollectLeafGradients.apply(hidden_S1h, leaves, held, sequence_group, *features_Jh), deepstack


class _CollectLeafGradients(torch.autograd.Function):
    """The identity of the embeddings, whose backward hands the leaves' gradients to the features.

    All language layers come after it, so its backward runs when they are done. Autograd fills leaves before anything
    else that is ready, so the leaves then hold their whole gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_S1h: Tensor,
        leaves_Wh: tuple[Tensor, ...],
        held: slice,
        sequence_group: dist.ProcessGroup | None,
        *features_Jh: Tensor,
    ) -> Tensor:
        ctx.leaves_Wh, ctx.held, ctx.sequence_group = leaves_Wh, held, sequence_group
        ctx.num_image_tokens = len(features_Jh[0])
        return hidden_S1h.view_as(hidden_S1h)

    @staticmethod
    def backward(ctx: Any, grad_S1h: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.leaves_Wh[0].requires_grad:
            return grad_S1h, None, None, None, *(None for _ in ctx.leaves_Wh)
        gathered_OWh = torch.stack([leaf.grad for leaf in ctx.leaves_Wh])
        # Zero where another rank holds the image token; the sum over the ranks is then the gradient of all.
        grad_OJh = gathered_OWh.new_zeros(len(ctx.leaves_Wh), ctx.num_image_tokens, gathered_OWh.shape[-1])
        grad_OJh[:, ctx.held] = gathered_OWh
        if ctx.sequence_group is not None:
            dist.all_reduce(grad_OJh, group=ctx.sequence_group)
        return grad_S1h, None, None, None, *grad_OJh.unbind(0)


class DeepstackLayer(TransformerLayer):
    """A language layer that adds its feature to the image tokens of its output."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden_S1h, context = super().forward(*args, **kwargs)
        deepstack: Deepstack | None = kwargs["packed_seq_params"].deepstack
        if deepstack is not None:
            feature_W1h = deepstack.features_Wh[self.layer_number - 1][:, None, :]
            hidden_S1h = hidden_S1h.index_add(0, deepstack.image_token_index_W, feature_W1h)
        return hidden_S1h, context
