"""The drop of the top token's probability when the image is perturbed, over slices of the vocabulary.

Shape suffix legend: U = positions of one chunk; V = this rank's vocabulary rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vppo.parallel.head_chunk import NO_LOGIT, stat_dtype

_NO_TOKEN = 2**62
"""Above every index; the top token of a rank without rows."""


def top_token_drop(
    logits_UV: Tensor,
    perturbed_logits_UV: Tensor,
    logsumexp_U: Tensor,
    perturbed_logsumexp_U: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Computes p(v | original) - p(v | perturbed) of the token v that is likeliest given the original image.

    Among equally likely ones it is the first. A collective over the group.

    Args:
        logits_UV, perturbed_logits_UV: this rank's slice, before the temperature; no columns on a rank without rows.
        logsumexp_U, perturbed_logsumexp_U: [U] nats, over the whole vocabulary.
        vocab_start: the global index of the first column.

    Returns:
        [U] on the rank that holds the token, 0.0 on the others: the parts of all slices add up to the drop.
    """
    dtype = stat_dtype(logits_UV.dtype)
    if logits_UV.shape[1]:
        peak_U = logits_UV.amax(1)
        own_U = (logits_UV == peak_U[:, None]).int().argmax(1)  # the first of several
        perturbed_U = perturbed_logits_UV.gather(1, own_U[:, None])[:, 0].to(dtype)
        token_U = vocab_start + own_U
    else:
        peak_U = logits_UV.new_full((len(logits_UV),), NO_LOGIT)
        perturbed_U = torch.zeros_like(logsumexp_U)
        token_U = torch.full_like(logsumexp_U, _NO_TOKEN, dtype=torch.int64)
    top_U, first_U = peak_U, token_U
    if group is not None and dist.get_world_size(group) > 1:
        top_U = peak_U.clone()
        dist.all_reduce(top_U, op=dist.ReduceOp.MAX, group=group)
        first_U = torch.where(peak_U == top_U, token_U, _NO_TOKEN)
        dist.all_reduce(first_U, op=dist.ReduceOp.MIN, group=group)
    p_U = (top_U.to(dtype) / temperature - logsumexp_U).exp()
    perturbed_p_U = (perturbed_U / temperature - perturbed_logsumexp_U).exp()
    return torch.where(first_U == token_U, p_U - perturbed_p_U, 0.0)
