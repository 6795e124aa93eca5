"""The vocabulary head: from hidden states of response tokens to log-probs, entropy and two-view divergence.

The vocabulary is split over the ranks of one process group. Positions go through the head in chunks, so that no more
than `chunk_tokens` rows of logits exist at once, in the forward and in the backward pass. Prompt tokens never reach it.
docs/adr/0011-fused-head.md has the time that the head takes besides its matrix products.

Shape suffix legend: N = response tokens of a micro-batch, flat; U = positions of one chunk; h = hidden size; V = this
rank's vocabulary rows; R = statistics per position, which are named where they are made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
from megatron_vppo.parallel.top_token import top_token_drop


@dataclass(frozen=True)
class TwoViews:
    """The same response tokens given the original and the perturbed image.

    [N] nats each, float32 (float64 for a float64 weight), equal on every rank of the group.
    """

    logp_N: Tensor
    entropy_N: Tensor
    """The entropy given the original image."""
    perturbed_logp_N: Tensor
    divergence_N: Tensor
    """Never negative, except for rounding. With top1_drop a difference of probabilities, of either sign."""
    perturbed_entropy_N: Tensor
    """The entropy given the perturbed image."""


def check_targets(token_ids: Sequence[int], *, vocab_size: int, banned_ids: Sequence[int]) -> None:
    """Refuses tokens that the head cannot score, before they are on a device: a look at them there would wait for it.

    Raises:
        ValueError: tokens that are banned or outside of the vocabulary.
    """
    targets_N = np.asarray(token_ids)
    outside = int(((targets_N < 0) | (targets_N >= vocab_size)).sum())
    if outside:
        raise ValueError(f"{outside} of {len(targets_N)} target tokens lie outside the vocabulary of {vocab_size}")
    banned = int(np.isin(targets_N, banned_ids).sum())
    if banned:
        raise ValueError(f"{banned} of {len(targets_N)} target tokens are banned: {tuple(banned_ids)}")


@dataclass(frozen=True)
class VocabHead:
    """One rank's slice of the output matrix, with the temperature and banned tokens that rollouts are sampled with."""

    weight_Vh: Tensor
    """float; this rank's rows of the output or tied embedding matrix, padding rows at the end included."""
    vocab_size: int
    """Tokens of the vocabulary. Rows from this global index on are padding: probability and gradient are zero."""
    temperature: float
    """The logits are divided by it."""
    chunk_tokens: int
    """The rows of logits that may exist at once."""
    group: dist.ProcessGroup | None = None
    """The ranks that hold the slices of the vocabulary. None: this rank holds all of it."""
    vocab_start: int = 0
    """The global index of this rank's first row."""
    banned_ids: tuple[int, ...] = ()
    """Tokens that cannot be sampled: their probability and gradient are zero, and the others' probabilities add up to
    one."""
    weight_grad_Vh: Tensor | None = None
    """A buffer to which the backward pass adds the gradient of the weight, such as Megatron's `main_grad`; float32
    (float64 for a float64 weight). Autograd then does not know of the weight, and the hidden states must require a
    gradient. If there is no buffer, the backward pass returns the gradient to autograd."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that are not positive and for a gradient that does not fit the weight."""
        if not self.temperature > 0 or self.chunk_tokens < 1:
            raise ValueError(
                f"temperature is {self.temperature} and chunk_tokens {self.chunk_tokens}; both must be positive"
            )
        grad_Vh, wanted = self.weight_grad_Vh, stat_dtype(self.weight_Vh.dtype)
        if grad_Vh is not None and (grad_Vh.shape != self.weight_Vh.shape or grad_Vh.dtype != wanted):
            raise ValueError(
                f"weight_grad_Vh is {list(grad_Vh.shape)} of {grad_Vh.dtype}; it must be "
                f"{list(self.weight_Vh.shape)} of {wanted}"
            )

    def token_logps(self, hidden_Nh: Tensor, target_N: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Computes log-probs of the target tokens, and the entropy of their distributions; both differentiable.

        The backward pass computes each chunk's logits again instead of keeping them. It sums the gradient of
        `hidden_Nh` over the group itself, so the hidden states must not pass through another mapping that does (such
        as Megatron's copy_to_tensor_model_parallel_region). The gradient of the weight is that of this rank's rows.

        Args:
            hidden_Nh: [N, h] float, after the final norm; equal on every rank of the group.
            target_N: [N] int64 in [0, vocab_size), none of them banned (see check_targets); equal on every rank of the
                group.
            with_entropy: also return the entropy of the full distribution.

        Returns:
            logp_N: [N] nats; float32 (float64 for float64 hidden states), whatever the dtype of the matrix product.
            entropy_N: the same, or None without with_entropy.

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(hidden_Nh)
        weight_Vh = self.weight_Vh if self.weight_grad_Vh is None else self.weight_Vh.detach()
        logp_N, entropy_N = _TokenLogps.apply(hidden_Nh, weight_Vh, target_N, self)
        return logp_N, entropy_N if with_entropy else None

    @torch.no_grad()
    def two_views(
        self, hidden_Nh: Tensor, perturbed_hidden_Nh: Tensor, target_N: Tensor, *, kind: Divergence
    ) -> TwoViews:
        """Computes all scores of tokens seen in two views, from one matrix product per view; no gradient.

        Args:
            hidden_Nh, perturbed_hidden_Nh: [N, h], the same tokens in the two views.
            target_N: as in token_logps.
            kind: KL(original || perturbed) over the whole vocabulary (paper Eq. 3), Jensen-Shannon, or the drop of the
                top token's probability.

        Raises:
            ValueError: as in token_logps, or an unknown kind.
        """
        self._check(hidden_Nh)
        if hidden_Nh.shape != perturbed_hidden_Nh.shape:
            raise ValueError(f"the two views have shapes {list(hidden_Nh.shape)} and {list(perturbed_hidden_Nh.shape)}")
        if kind != "top1_drop" and kind not in DIVERGENCES:
            raise ValueError(f"kind is {kind!r}; set it to 'kl_full', 'jsd' or 'top1_drop'")
        rows_Vh, banned_rows = self.rows_Vh, self.banned_rows
        local_N, owned_N = self.local_targets(target_N)
        result_5N = hidden_Nh.new_zeros(5, len(hidden_Nh), dtype=stat_dtype(hidden_Nh.dtype))
        # One turn takes U positions of both views, so that 2U <= chunk_tokens rows of logits exist (U is at least 1):
        #
        #     hidden_Nh[chunk]    perturbed_hidden_Nh[chunk]
        #           | @ rows_Vh.T         | @ rows_Vh.T
        #        [U, V]                [U, V]      logits, kept until the divergence is taken
        #           | chunk_sums          | chunk_sums
        #        [R, U]                [R, U]
        #           '----- cat to [R, 2U] -----'   one all-reduce over the slices of the vocabulary serves both
        #           |                     |
        #     logp, entropy        perturbed logp  and two log-sum-exps, with which the logits give the divergence
        for chunk in chunks(len(hidden_Nh), max(1, self.chunk_tokens // 2)):
            logits = [
                chunk_logits(view_Nh[chunk], rows_Vh, banned_rows) for view_Nh in (hidden_Nh, perturbed_hidden_Nh)
            ]
            sums = [
                chunk_sums(logits_UV, local_U=local_N[chunk], owned_U=owned_N[chunk], temperature=self.temperature)
                for logits_UV in logits
            ]
            both = join_slices(torch.cat(sums, dim=1), self.group)  # of 2U positions, the original ones first
            (logp_U, perturbed_logp_U), (entropy_U, perturbed_entropy_U) = both.logp_N.chunk(2), both.entropy_N.chunk(2)
            result_5N[:3, chunk] = torch.stack([logp_U, entropy_U, perturbed_logp_U])
            result_5N[4, chunk] = perturbed_entropy_U
            logsumexps = both.logsumexp_N.chunk(2)
            if kind == "top1_drop":
                result_5N[3, chunk] = top_token_drop(
                    *logits, *logsumexps, temperature=self.temperature, vocab_start=self.vocab_start, group=self.group
                )
            elif len(rows_Vh):
                result_5N[3, chunk] = chunk_divergence(*logits, *logsumexps, kind=kind, temperature=self.temperature)
        # A divergence is a sum over the vocabulary, so the slices' parts of all chunks are added at the end, at once.
        all_reduce(result_5N[3], self.group)
        return TwoViews(*result_5N)

    # --- This rank's slice --------------------------------------------------------------------------------------------

    @property
    def rows_Vh(self) -> Tensor:
        """The weight without its padding rows; empty on a rank that holds only such rows."""
        return self.weight_Vh[: max(0, self.vocab_size - self.vocab_start)]

    @property
    def banned_rows(self) -> Tensor:
        """int64; the indices of the banned tokens among this rank's rows."""
        local = [token - self.vocab_start for token in self.banned_ids]
        held = tuple(row for row in local if 0 <= row < len(self.rows_Vh))
        return _on_device(held, self.weight_Vh.device)

    def local_targets(self, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each target's index among this rank's rows (0 if another rank holds it), and if it is held."""
        local_N = target_N - self.vocab_start
        owned_N = (local_N >= 0) & (local_N < len(self.rows_Vh))
        return torch.where(owned_N, local_N, 0), owned_N

    def _check(self, hidden_Nh: Tensor) -> None:
        weight_Vh = self.weight_Vh
        if hidden_Nh.dim() != 2 or weight_Vh.dim() != 2 or hidden_Nh.shape[1] != weight_Vh.shape[1]:
            raise ValueError(
                f"hidden states {list(hidden_Nh.shape)} and head weight {list(weight_Vh.shape)} do not fit: "
                "pass [positions, hidden] and [vocabulary rows, hidden]"
            )


@functools.lru_cache(maxsize=16)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns int64 numbers, sent to the device once in a run: the host waits for such a copy."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


class _TokenLogps(torch.autograd.Function):
    """The body of VocabHead.token_logps, with a backward pass that keeps no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_Nh: Tensor, weight_Vh: Tensor, target_N: Tensor, head: VocabHead
    ) -> tuple[Tensor, Tensor]:
        """`weight_Vh` is that of `head`, passed again because autograd looks for inputs among the arguments only."""
        rows_Vh, banned_rows = head.rows_Vh, head.banned_rows
        local_N, owned_N = head.local_targets(target_N)
        sums_RN = hidden_Nh.new_zeros(4, len(hidden_Nh), dtype=stat_dtype(hidden_Nh.dtype))
        for chunk in chunks(len(hidden_Nh), head.chunk_tokens):
            logits_UV = chunk_logits(hidden_Nh[chunk], rows_Vh, banned_rows)
            sums_RN[:, chunk] = chunk_sums(
                logits_UV, local_U=local_N[chunk], owned_U=owned_N[chunk], temperature=head.temperature
            )
            del logits_UV  # before the next chunk's are made
        joined = join_slices(sums_RN, head.group)
        ctx.save_for_backward(hidden_Nh, weight_Vh, target_N, joined.logsumexp_N, joined.entropy_N)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return joined.logp_N, joined.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_N, grad_entropy_N = grads
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * 4
        head: VocabHead = ctx.head
        hidden_Nh, weight_Vh, target_N, logsumexp_N, entropy_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        if grad_logp_N is None:
            grad_logp_N = torch.zeros_like(logsumexp_N)
        if grad_entropy_N is None:
            entropy_N = None  # the gradient of the log-probs does not need it
        rows_Vh, banned_rows = head.rows_Vh, head.banned_rows
        local_N, owned_N = head.local_targets(target_N)
        grad_hidden_Nh = torch.zeros_like(hidden_Nh) if wants_hidden else None
        sum_Vh = head.weight_grad_Vh
        if wants_weight:
            # Summed over chunks in float32 or better: bfloat16 would lose what each further chunk adds.
            sum_Vh = weight_Vh.new_zeros(weight_Vh.shape, dtype=stat_dtype(hidden_Nh.dtype))
        for chunk in chunks(len(hidden_Nh) if len(rows_Vh) else 0, head.chunk_tokens):
            grad_UV = chunk_gradient(
                chunk_logits(hidden_Nh[chunk], rows_Vh, banned_rows),
                logsumexp_N[chunk],
                grad_logp_N[chunk],
                _cut(entropy_N, chunk),
                _cut(grad_entropy_N, chunk),
                local_U=local_N[chunk],
                owned_U=owned_N[chunk],
                temperature=head.temperature,
            )
            if grad_hidden_Nh is not None:
                grad_hidden_Nh[chunk] = grad_UV @ rows_Vh
            if sum_Vh is not None:
                add_product(sum_Vh[: len(rows_Vh)], grad_UV.T, hidden_Nh[chunk])
            del grad_UV  # before the next chunk's logits are made
        if grad_hidden_Nh is not None:
            grad_hidden_Nh = all_reduce(grad_hidden_Nh, head.group)
        returned_Vh = sum_Vh.to(weight_Vh.dtype) if sum_Vh is not None and wants_weight else None
        return grad_hidden_Nh, returned_Vh, None, None


def chunks(num_positions: int, size: int) -> Iterator[slice]:
    """Yields slices of at most `size` positions, which cover all."""
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


def _cut(value_N: Tensor | None, chunk: slice) -> Tensor | None:
    return None if value_N is None else value_N[chunk]


# --- Over the slices of the vocabulary --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """Statistics over the whole vocabulary; nats."""

    logp_N: Tensor
    entropy_N: Tensor
    logsumexp_N: Tensor


def join_slices(sums_RN: Tensor, group: dist.ProcessGroup | None) -> Joined:
    """Joins the ranks' sums: peak, sum of e^x, sum of x e^x, target logit (see chunk_sums).

    x is a logit less the peak of its rank. To add sums of different ranks, each x is first moved to the peak of all
    ranks, by adding s = own peak - common peak, which is at most 0. Then e^x becomes e^s e^x, and x e^x becomes
    e^s (x e^x + s e^x).
    """
    peak_N = sums_RN[0]
    top_N = all_reduce(peak_N.clone(), group, dist.ReduceOp.MAX)
    shift_N = peak_N - top_N
    shrink_N = shift_N.exp()
    total_N, weighted_N, target_N = all_reduce(
        torch.stack([shrink_N * sums_RN[1], shrink_N * (sums_RN[2] + shift_N * sums_RN[1]), sums_RN[3]]), group
    )
    log_total_N = total_N.log()
    return Joined(
        logp_N=(target_N - top_N) - log_total_N,
        entropy_N=log_total_N - weighted_N / total_N,
        logsumexp_N=top_N + log_total_N,
    )


def all_reduce(value: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduces in place; every rank of the group gets the result. Without a group the value is already whole."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(value, op=op, group=group)
    return value
