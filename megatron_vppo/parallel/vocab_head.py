"""The vocabulary head: from hidden states of response positions to log-probs, entropy and two-view divergence.

Vocabulary-parallel over one process group, and chunked over tokens, so that no more than `chunk_tokens` rows of logits
exist at once, in the forward and in the backward pass. Prompt positions never reach it.

Shape suffix legend: N = response positions, C = positions of one chunk, H = hidden size, V = this rank's vocabulary
rows (padding included until `_local_rows` cuts it off), R = statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vppo.algorithm.dependency import jsd, kl_full

# Logit of a banned token, and the largest of a rank that holds only padded vocabulary rows: finite, so that 0 * it
# stays 0.
NO_LOGIT = -1e30


def token_logps(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
    banned_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the target tokens, and the entropy of their distributions; both differentiable.

    The backward pass computes each chunk's logits again instead of keeping them. It returns to `hidden_NH` the gradient
    summed over the group: no further all-reduce belongs before it. The gradient of `weight_VH` is this rank's own.

    Args:
        hidden_NH: [N, H] float, after the final norm; equal on every rank of the group.
        weight_VH: [V, H] float, this rank's rows of the output or tied embedding matrix.
        targets_N: [N] int64 in [0, vocab_size); equal on every rank of the group.
        group: ranks that hold the slices of the vocabulary; None: this rank holds all of it.
        vocab_start: global index of the first of this rank's rows.
        vocab_size: without padding. Rows with a global index from here on have probability and gradient zero.
        temperature: the logits are divided by it.
        chunk_tokens: rows of logits that may exist at once.
        with_entropy: also return the entropy of the full distribution.
        banned_ids: tokens that cannot be sampled: probability and gradient zero, the others share the whole.

    Returns:
        logp_N: [N] nats; float32 (float64 for float64 hidden states), whatever the dtype of the matrix product.
        entropy_N: the same, or None without with_entropy.
    """
    _check(hidden_NH, weight_VH, temperature=temperature, chunk_tokens=chunk_tokens)
    outside = int(((targets_N < 0) | (targets_N >= vocab_size)).sum())
    if outside:
        raise ValueError(f"{outside} of {targets_N.numel()} target tokens lie outside the vocabulary of {vocab_size}")
    banned = int(torch.isin(targets_N, torch.tensor(banned_ids, device=targets_N.device)).sum()) if banned_ids else 0
    if banned:
        raise ValueError(f"{banned} of {targets_N.numel()} target tokens are banned: {tuple(banned_ids)}")
    logp_N, entropy_N = _TokenLogps.apply(
        hidden_NH, weight_VH, targets_N, group, vocab_start, vocab_size, temperature, chunk_tokens, with_entropy,
        banned_ids,
    )  # fmt: skip
    return logp_N, entropy_N if with_entropy else None


@torch.no_grad()
def two_view_divergence(
    hidden_NH: Tensor,
    masked_hidden_NH: Tensor,
    weight_VH: Tensor,
    *,
    kind: Literal["kl_full", "jsd"],
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    temperature: float,
    chunk_tokens: int,
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """Divergence between the next-token distributions given the original and the perturbed image, without gradient.

    Args:
        hidden_NH, masked_hidden_NH: [N, H], the same positions in the two views.
        kind: KL(original || perturbed) over the whole vocabulary (paper Eq. 3), or Jensen-Shannon.
        chunk_tokens: rows of logits that may exist at once, of both views together.
        group, vocab_start, vocab_size, temperature, weight_VH, banned_ids: as in token_logps.

    Returns:
        [N] nats, float32 (float64 for float64 hidden states), never negative; equal on every rank of the group.
    """
    _check(hidden_NH, weight_VH, temperature=temperature, chunk_tokens=chunk_tokens)
    if hidden_NH.shape != masked_hidden_NH.shape:
        raise ValueError(f"the two views have shapes {list(hidden_NH.shape)} and {list(masked_hidden_NH.shape)}")
    if kind not in ("kl_full", "jsd"):
        raise ValueError(f"kind is {kind!r}; set it to 'kl_full' or 'jsd'")
    divergence = kl_full if kind == "kl_full" else jsd
    weight_VH = _local_rows(weight_VH, vocab_start, vocab_size)
    banned_V = _local_banned(banned_ids, vocab_start, weight_VH)
    divergence_N = hidden_NH.new_zeros(len(hidden_NH), dtype=_stat_dtype(hidden_NH))
    for rows in _chunks(len(hidden_NH), max(1, chunk_tokens // 2)):
        logps = []
        for view_NH in (hidden_NH, masked_hidden_NH):
            logits_CV = _logits(view_NH[rows], weight_VH, temperature, banned_V)
            peak_C = _all_reduce(_peak(logits_CV), group, dist.ReduceOp.MAX)
            total_C = _all_reduce((logits_CV - peak_C[:, None]).exp().sum(1), group)
            logps.append(logits_CV.sub_((peak_C + total_C.log())[:, None]))
        divergence_N[rows] = divergence(logps[0], logps[1])
    # The slices of the vocabulary add up, so one reduction at the end serves all chunks.
    return _all_reduce(divergence_N, group)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
        banned_ids: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        rows_VH = _local_rows(weight_VH, vocab_start, vocab_size)
        local_N, owned_N = _local_targets(targets_N, vocab_start, len(rows_VH))
        banned_V = _local_banned(banned_ids, vocab_start, rows_VH)
        dtype = _stat_dtype(hidden_NH)
        peak_N = hidden_NH.new_empty(len(hidden_NH), dtype=dtype)
        # Rows: sum of exp(logit - peak); target logit; sum of exp(logit - peak) * (logit - peak).
        sums_RN = hidden_NH.new_zeros(3, len(hidden_NH), dtype=dtype)
        for rows in _chunks(len(hidden_NH), chunk_tokens):
            logits_CV = _logits(hidden_NH[rows], rows_VH, temperature, banned_V)
            peak_N[rows] = _peak(logits_CV)
            if len(rows_VH):
                target_C = logits_CV.gather(1, local_N[rows, None])[:, 0]
                sums_RN[1, rows] = torch.where(owned_N[rows], target_C, 0.0)
            shifted_CV = logits_CV.sub_(peak_N[rows, None])
            exp_CV = shifted_CV.exp()
            sums_RN[0, rows] = exp_CV.sum(1)
            if with_entropy:
                sums_RN[2, rows] = exp_CV.mul_(shifted_CV).sum(1)
        # Statistics of each rank refer to its own peak: restate them for the peak of all, then add.
        top_N = _all_reduce(peak_N.clone(), group, dist.ReduceOp.MAX)
        shift_N = peak_N - top_N
        sums_RN[2] = shift_N.exp() * (sums_RN[2] + shift_N * sums_RN[0])
        sums_RN[0] *= shift_N.exp()
        total_N, target_N, weighted_N = _all_reduce(sums_RN, group)
        log_total_N = total_N.log()
        logp_N = (target_N - top_N) - log_total_N
        entropy_N = log_total_N - weighted_N / total_N if with_entropy else torch.zeros_like(logp_N)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, top_N + log_total_N, entropy_N)
        ctx.settings = (group, vocab_start, vocab_size, temperature, chunk_tokens, banned_ids)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_N, grad_entropy_N = grads
        hidden_NH, weight_VH, targets_N, logsumexp_N, entropy_N = ctx.saved_tensors
        group, vocab_start, vocab_size, temperature, chunk_tokens, banned_ids = ctx.settings
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * 10
        rows_VH = _local_rows(weight_VH, vocab_start, vocab_size)
        local_N, owned_N = _local_targets(targets_N, vocab_start, len(rows_VH))
        banned_V = _local_banned(banned_ids, vocab_start, rows_VH)
        grad_hidden_NH = torch.zeros_like(hidden_NH) if wants_hidden else None
        # Summed over chunks in float32 or better: bfloat16 would lose what each further chunk adds.
        sum_dtype = _stat_dtype(hidden_NH)
        grad_weight_VH = weight_VH.new_zeros(weight_VH.shape, dtype=sum_dtype) if wants_weight else None
        for rows in _chunks(len(hidden_NH) if len(rows_VH) else 0, chunk_tokens):
            logp_CV = _logits(hidden_NH[rows], rows_VH, temperature, banned_V).sub_(logsumexp_N[rows, None])
            p_CV = logp_CV.exp()
            grad_CV = torch.zeros_like(p_CV)
            if grad_entropy_N is not None:
                grad_CV -= p_CV * logp_CV.add_(entropy_N[rows, None]) * grad_entropy_N[rows, None]
            if grad_logp_N is not None:
                grad_CV -= p_CV * grad_logp_N[rows, None]
                own_C = torch.where(owned_N[rows], grad_logp_N[rows], 0.0)
                grad_CV.scatter_add_(1, local_N[rows, None], own_C[:, None])
            grad_CV = grad_CV.div_(temperature).to(hidden_NH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = grad_CV @ rows_VH
            if grad_weight_VH is not None:
                grad_weight_VH[: len(rows_VH)] += grad_CV.T @ hidden_NH[rows]
        if grad_hidden_NH is not None:
            grad_hidden_NH = _all_reduce(grad_hidden_NH, group)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return (grad_hidden_NH, grad_weight_VH, *(None,) * 8)


def _check(hidden_NH: Tensor, weight_VH: Tensor, *, temperature: float, chunk_tokens: int) -> None:
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden_NH.shape)} and head weight {list(weight_VH.shape)} do not fit: "
            "pass [positions, hidden] and [vocabulary rows, hidden]"
        )
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(f"temperature is {temperature} and chunk_tokens {chunk_tokens}; both must be positive")


def _stat_dtype(hidden_NH: Tensor) -> torch.dtype:
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32


def _local_rows(weight_VH: Tensor, vocab_start: int, vocab_size: int) -> Tensor:
    """This rank's rows without padding; none, where all of them are padding."""
    return weight_VH[: max(0, vocab_size - vocab_start)]


def _local_targets(targets_N: Tensor, vocab_start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Index of each target among this rank's rows (0 where another rank holds it), and whether this rank holds it."""
    local_N = targets_N - vocab_start
    owned_N = (local_N >= 0) & (local_N < num_rows)
    return torch.where(owned_N, local_N, 0), owned_N


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _local_banned(banned_ids: Sequence[int], vocab_start: int, weight_VH: Tensor) -> Tensor:
    """Indices of the banned tokens among this rank's rows."""
    local = [token - vocab_start for token in banned_ids if 0 <= token - vocab_start < len(weight_VH)]
    return torch.tensor(local, dtype=torch.int64, device=weight_VH.device)


def _logits(hidden_CH: Tensor, weight_VH: Tensor, temperature: float, banned_V: Tensor) -> Tensor:
    """[C, V] in float32 or better. The product itself runs in the model's dtype, as the rollout engine computes it."""
    logits_CV = (hidden_CH @ weight_VH.T).to(_stat_dtype(hidden_CH)).div_(temperature)
    return logits_CV.index_fill_(1, banned_V, NO_LOGIT) if len(banned_V) else logits_CV


def _peak(logits_CV: Tensor) -> Tensor:
    return logits_CV.amax(1) if logits_CV.shape[1] else logits_CV.new_full((len(logits_CV),), NO_LOGIT)


def _all_reduce(value: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """In place; every rank of the group gets the result. Without a group the value is already whole."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(value, op=op, group=group)
    return value
