"""Log-probs of several chosen tokens at each position, differentiable, over slices of the vocabulary.

Shape suffix legend: N = response tokens of a micro-batch, flat; U = positions of one chunk; R = statistics per
position, one for each chosen token; V = this rank's vocabulary rows; h = hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vppo.parallel.head_chunk import add_product, chunk_logits, chunk_sums, stat_dtype
from megatron_vppo.parallel.vocab_head import VocabHead, all_reduce, chunks, join_slices


def chosen_logps(head: VocabHead, hidden_Nh: Tensor, chosen_NR: Tensor) -> Tensor:
    """Computes the log-probs [N, R] of chosen tokens in nats, each normalised over the whole vocabulary.

    It makes the logits once more after `VocabHead.token_logps`, to which it is otherwise alike: chunks of positions,
    no logits kept for the backward pass, the gradient of `hidden_Nh` summed over the group.

    Args:
        hidden_Nh: [N, h] float, after the final norm; equal on every rank of the head's group.
        chosen_NR: [N, R] int64 in [0, vocab_size); equal on every rank of the group. Banned ones have -1e30 or so.

    Returns:
        float32 (float64 for float64 hidden states).
    """
    weight_Vh = head.weight_Vh if head.weight_grad_Vh is None else head.weight_Vh.detach()
    logp_NR: Tensor = _ChosenLogps.apply(hidden_Nh, weight_Vh, chosen_NR, head)
    return logp_NR


class _ChosenLogps(torch.autograd.Function):
    """The body of chosen_logps."""

    @staticmethod
    def forward(ctx: Any, hidden_Nh: Tensor, weight_Vh: Tensor, chosen_NR: Tensor, head: VocabHead) -> Tensor:
        """`weight_Vh` is that of `head`, passed again because autograd looks for inputs among the arguments only."""
        dtype = stat_dtype(hidden_Nh.dtype)
        local_NR, owned_NR = head.local_targets(chosen_NR)
        sums_RN = hidden_Nh.new_zeros(4, len(hidden_Nh), dtype=dtype)
        logit_NR = hidden_Nh.new_zeros(chosen_NR.shape, dtype=dtype)
        for chunk in chunks(len(hidden_Nh), head.chunk_tokens):
            logits_UV = chunk_logits(hidden_Nh[chunk], head.rows_Vh, head.banned_rows)
            first_U, none_U = local_NR[chunk, 0], torch.zeros_like(owned_NR[chunk, 0])
            sums_RN[:, chunk] = chunk_sums(logits_UV, local_U=first_U, owned_U=none_U, temperature=head.temperature)
            if len(head.rows_Vh):
                found_UR = logits_UV.gather(1, local_NR[chunk]).to(dtype) / head.temperature
                logit_NR[chunk] = torch.where(owned_NR[chunk], found_UR, 0.0)
            del logits_UV  # before the next chunk's are made
        logsumexp_N = join_slices(sums_RN, head.group).logsumexp_N
        ctx.save_for_backward(hidden_Nh, weight_Vh, chosen_NR, logsumexp_N)
        ctx.head = head
        return all_reduce(logit_NR, head.group) - logsumexp_N[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
        head: VocabHead = ctx.head
        hidden_Nh, weight_Vh, chosen_NR, logsumexp_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        local_NR, owned_NR = head.local_targets(chosen_NR)
        rows_Vh = head.rows_Vh
        grad_hidden_Nh = torch.zeros_like(hidden_Nh) if wants_hidden else None
        sum_Vh = head.weight_grad_Vh
        if wants_weight:
            sum_Vh = weight_Vh.new_zeros(weight_Vh.shape, dtype=stat_dtype(hidden_Nh.dtype))
        for chunk in chunks(len(hidden_Nh) if len(rows_Vh) else 0, head.chunk_tokens):
            logits_UV = chunk_logits(hidden_Nh[chunk], rows_Vh, head.banned_rows)
            grad_UR = grad_NR[chunk] / head.temperature
            # By a logit: that of its own token, less p times the sum over all chosen ones.
            grad_UV = (logits_UV.to(grad_UR.dtype) / head.temperature - logsumexp_N[chunk, None]).exp_()
            grad_UV.mul_(-grad_UR.sum(1, keepdim=True))
            grad_UV.scatter_add_(1, local_NR[chunk], torch.where(owned_NR[chunk], grad_UR, 0.0))
            grad_UV = grad_UV.to(logits_UV.dtype)
            if grad_hidden_Nh is not None:
                grad_hidden_Nh[chunk] = grad_UV @ rows_Vh
            if sum_Vh is not None:
                add_product(sum_Vh[: len(rows_Vh)], grad_UV.T, hidden_Nh[chunk])
            del grad_UV, logits_UV  # before the next chunk's are made
        if grad_hidden_Nh is not None:
            grad_hidden_Nh = all_reduce(grad_hidden_Nh, head.group)
        returned_Vh = sum_Vh.to(weight_Vh.dtype) if sum_Vh is not None and wants_weight else None
        return grad_hidden_Nh, returned_Vh, None, None
