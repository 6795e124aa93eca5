"""The vocabulary head: from hidden states of response positions to log-probs, entropy and two-view divergence.

Vocabulary-parallel over one process group, and chunked over tokens, so that no more than `chunk_tokens` rows of logits
exist at once, in the forward and in the backward pass. Prompt positions never reach it. What it costs beside its matrix
products: docs/adr/0011-fused-head.md.

Shape suffix legend: N = response positions, C = positions of one chunk (in two views: first those of the original,
then as many of the perturbed one), H = hidden size, V = this rank's vocabulary rows (padding included until
`_local_rows` cuts it off), R = statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vppo.config.choices import Divergence
from megatron_vppo.parallel.head_chunk import (
    DIVERGENCES,
    add_product,
    chunk_divergence,
    chunk_gradient,
    chunk_logits,
    chunk_sums,
    stat_dtype,
)


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
    weight_grad_VH: Tensor | None = None,
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
        weight_grad_VH: [V, H], float32 (float64 for float64 hidden states): where the backward pass adds the gradient
            of `weight_VH`, such as Megatron's `main_grad`; autograd then gets none. None: autograd gets it.

    Returns:
        logp_N: [N] nats; float32 (float64 for float64 hidden states), whatever the dtype of the matrix product.
        entropy_N: the same, or None without with_entropy.
    """
    _check(hidden_NH, weight_VH, temperature=temperature, chunk_tokens=chunk_tokens)
    _check_targets(targets_N, vocab_size=vocab_size, banned_ids=banned_ids)
    if weight_grad_VH is not None and (
        weight_grad_VH.shape != weight_VH.shape or weight_grad_VH.dtype != stat_dtype(hidden_NH.dtype)
    ):
        raise ValueError(
            f"weight_grad_VH is {list(weight_grad_VH.shape)} of {weight_grad_VH.dtype}; it must be "
            f"{list(weight_VH.shape)} of {stat_dtype(hidden_NH.dtype)}"
        )
    logp_N, entropy_N = _TokenLogps.apply(
        hidden_NH, weight_VH, targets_N, weight_grad_VH, group, vocab_start, vocab_size, temperature, chunk_tokens,
        with_entropy, banned_ids,
    )  # fmt: skip
    return logp_N, entropy_N if with_entropy else None


@dataclass(frozen=True)
class TwoViewScores:
    """[N] nats each; float32 (float64 for float64 hidden states); equal on every rank of the group."""

    logp_N: Tensor
    entropy_N: Tensor
    """Given the original image."""
    perturbed_logp_N: Tensor
    """Given the perturbed one."""
    divergence_N: Tensor
    """Never negative."""


@torch.no_grad()
def score_two_views(
    hidden_NH: Tensor,
    perturbed_hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    kind: Divergence,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    temperature: float,
    chunk_tokens: int,
    banned_ids: Sequence[int] = (),
) -> TwoViewScores:
    """All that scoring wants to know of positions seen in two views, from one matrix product per view; no gradient.

    Args:
        hidden_NH, perturbed_hidden_NH: [N, H], the same positions in the two views.
        kind: KL(original || perturbed) over the whole vocabulary (paper Eq. 3), or Jensen-Shannon.
        chunk_tokens: rows of logits that may exist at once, of both views together.
        weight_VH, targets_N, group, vocab_start, vocab_size, temperature, banned_ids: as in token_logps.
    """
    _check(hidden_NH, weight_VH, temperature=temperature, chunk_tokens=chunk_tokens)
    _check_targets(targets_N, vocab_size=vocab_size, banned_ids=banned_ids)
    if hidden_NH.shape != perturbed_hidden_NH.shape:
        raise ValueError(f"the two views have shapes {list(hidden_NH.shape)} and {list(perturbed_hidden_NH.shape)}")
    if kind not in DIVERGENCES:
        raise ValueError(f"kind is {kind!r}; set it to 'kl_full' or 'jsd'")
    rows_VH = _local_rows(weight_VH, vocab_start, vocab_size)
    local_N, owned_N = _local_targets(targets_N, vocab_start, len(rows_VH))
    banned_V = _local_banned(banned_ids, vocab_start, rows_VH)
    results_RN = hidden_NH.new_zeros(4, len(hidden_NH), dtype=stat_dtype(hidden_NH.dtype))
    for rows in _chunks(len(hidden_NH), max(1, chunk_tokens // 2)):
        views = [chunk_logits(view_NH[rows], rows_VH, banned_V) for view_NH in (hidden_NH, perturbed_hidden_NH)]
        targets = {"local_C": local_N[rows], "owned_C": owned_N[rows]}
        sums = [chunk_sums(logits_CV, **targets, temperature=temperature) for logits_CV in views]
        both = _whole(torch.cat(sums, dim=1), group)
        (logp_C, perturbed_logp_C), (entropy_C, _) = both.logp_N.chunk(2), both.entropy_N.chunk(2)
        results_RN[:3, rows] = torch.stack([logp_C, entropy_C, perturbed_logp_C])
        if len(rows_VH):
            logsumexps = both.logsumexp_N.chunk(2)
            results_RN[3, rows] = chunk_divergence(*views, *logsumexps, kind=kind, temperature=temperature)
    # The slices of the vocabulary add up, so one reduction at the end serves all chunks.
    _all_reduce(results_RN[3], group)
    return TwoViewScores(*results_RN)


def two_view_divergence(
    hidden_NH: Tensor,
    perturbed_hidden_NH: Tensor,
    weight_VH: Tensor,
    *,
    kind: Divergence,
    **settings: Any,
) -> Tensor:
    """`divergence_N` of score_two_views alone, which takes the same arguments besides targets.

    Returns:
        [N] nats.
    """
    first = next(i for i in range(settings["vocab_size"]) if i not in settings.get("banned_ids", ()))
    targets_N = torch.full((len(hidden_NH),), first, device=hidden_NH.device)  # of no effect on the divergence
    return score_two_views(hidden_NH, perturbed_hidden_NH, weight_VH, targets_N, kind=kind, **settings).divergence_N


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        weight_grad_VH: Tensor | None,
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
        sums_RN = hidden_NH.new_zeros(4, len(hidden_NH), dtype=stat_dtype(hidden_NH.dtype))
        for rows in _chunks(len(hidden_NH), chunk_tokens):
            logits_CV = chunk_logits(hidden_NH[rows], rows_VH, banned_V)
            sums_RN[:, rows] = chunk_sums(
                logits_CV, local_C=local_N[rows], owned_C=owned_N[rows], temperature=temperature
            )
            del logits_CV  # before the next chunk's are made
        whole = _whole(sums_RN, group)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, whole.logsumexp_N, whole.entropy_N)
        ctx.settings = (weight_grad_VH, group, vocab_start, vocab_size, temperature, chunk_tokens, banned_ids)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(whole.entropy_N)
        return whole.logp_N, whole.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_N, grad_entropy_N = grads
        hidden_NH, weight_VH, targets_N, logsumexp_N, entropy_N = ctx.saved_tensors
        weight_grad_VH, group, vocab_start, vocab_size, temperature, chunk_tokens, banned_ids = ctx.settings
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * 11
        if grad_logp_N is None:
            grad_logp_N = torch.zeros_like(logsumexp_N)
        rows_VH = _local_rows(weight_VH, vocab_start, vocab_size)
        local_N, owned_N = _local_targets(targets_N, vocab_start, len(rows_VH))
        banned_V = _local_banned(banned_ids, vocab_start, rows_VH)
        grad_hidden_NH = torch.zeros_like(hidden_NH) if wants_hidden else None
        # Summed over chunks in float32 or better: bfloat16 would lose what each further chunk adds.
        sum_VH = weight_grad_VH
        if wants_weight and sum_VH is None:
            sum_VH = weight_VH.new_zeros(weight_VH.shape, dtype=stat_dtype(hidden_NH.dtype))
        for rows in _chunks(len(hidden_NH) if len(rows_VH) else 0, chunk_tokens):
            grad_CV = chunk_gradient(
                chunk_logits(hidden_NH[rows], rows_VH, banned_V),
                logsumexp_N[rows],
                grad_logp_N[rows],
                *((None, None) if grad_entropy_N is None else (entropy_N[rows], grad_entropy_N[rows])),
                local_C=local_N[rows],
                owned_C=owned_N[rows],
                temperature=temperature,
            )
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = grad_CV @ rows_VH
            if wants_weight:
                add_product(sum_VH[: len(rows_VH)], grad_CV.T, hidden_NH[rows])
            del grad_CV  # before the next chunk's logits are made
        if grad_hidden_NH is not None:
            grad_hidden_NH = _all_reduce(grad_hidden_NH, group)
        returned_VH = sum_VH.to(weight_VH.dtype) if wants_weight and weight_grad_VH is None else None
        return (grad_hidden_NH, returned_VH, *(None,) * 9)


# ---- the whole vocabulary


@dataclass(frozen=True)
class _Whole:
    """Over all slices of the vocabulary; nats."""

    logp_N: Tensor
    entropy_N: Tensor
    logsumexp_N: Tensor


def _whole(sums_RN: Tensor, group: dist.ProcessGroup | None) -> _Whole:
    """Statistics of each rank refer to its own peak: restates them for the peak of all, then adds."""
    peak_N = sums_RN[0]
    top_N = _all_reduce(peak_N.clone(), group, dist.ReduceOp.MAX)
    shift_N = peak_N - top_N
    shrink_N = shift_N.exp()
    total_N, weighted_N, target_N = _all_reduce(
        torch.stack([shrink_N * sums_RN[1], shrink_N * (sums_RN[2] + shift_N * sums_RN[1]), sums_RN[3]]), group
    )
    log_total_N = total_N.log()
    return _Whole(
        logp_N=(target_N - top_N) - log_total_N,
        entropy_N=log_total_N - weighted_N / total_N,
        logsumexp_N=top_N + log_total_N,
    )


def _all_reduce(value: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """In place; every rank of the group gets the result. Without a group the value is already whole."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(value, op=op, group=group)
    return value


def _check(hidden_NH: Tensor, weight_VH: Tensor, *, temperature: float, chunk_tokens: int) -> None:
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden states {list(hidden_NH.shape)} and head weight {list(weight_VH.shape)} do not fit: "
            "pass [positions, hidden] and [vocabulary rows, hidden]"
        )
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(f"temperature is {temperature} and chunk_tokens {chunk_tokens}; both must be positive")


def _check_targets(targets_N: Tensor, *, vocab_size: int, banned_ids: Sequence[int]) -> None:
    outside = int(((targets_N < 0) | (targets_N >= vocab_size)).sum())
    if outside:
        raise ValueError(f"{outside} of {targets_N.numel()} target tokens lie outside the vocabulary of {vocab_size}")
    banned = int(torch.isin(targets_N, torch.tensor(banned_ids, device=targets_N.device)).sum()) if banned_ids else 0
    if banned:
        raise ValueError(f"{banned} of {targets_N.numel()} target tokens are banned: {tuple(banned_ids)}")


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
