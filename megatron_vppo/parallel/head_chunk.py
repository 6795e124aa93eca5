"""One chunk of the vocabulary head: its logits, the statistics read off them, and their gradient.

Besides the matrix products, every logit is touched by three functions only: `softmax_sums`, `logit_gradient` and
`divergence_sum`. On CPU they run as they stand. On a GPU `torch.compile` makes one kernel of each, which reads the
chunk once or twice in the dtype of the matrix product and writes it at most once; separate operations in float32 would
take longer than the matrix products (docs/adr/0011-fused-head.md).

Shape suffix legend: U = positions of one chunk; V = this rank's vocabulary rows; h = hidden size; R = statistics per
position. Logits are those of the matrix product, before the temperature; statistics are float32 (float64 for float64
logits), in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.algorithm.dependency import jsd, kl_full
from megatron_vppo.config.choices import Divergence

DIVERGENCES = {"kl_full": kl_full, "jsd": jsd}

NO_LOGIT = -1e30
"""The logit of a banned token, and the peak of a rank that holds only padding rows. Finite, so that 0 times it is 0."""


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Statistics and gradient of a chunk -------------------------------------------------------------------------------


def chunk_logits(hidden_Uh: Tensor, weight_Vh: Tensor, banned_rows: Tensor) -> Tensor:
    """Logits [U, V] in the model's dtype, as the rollout engine computes them.

    Args:
        banned_rows: int64; the rows of V whose logits become NO_LOGIT.
    """
    logits_UV = hidden_Uh @ weight_Vh.T
    return logits_UV.index_fill_(1, banned_rows, NO_LOGIT) if len(banned_rows) else logits_UV


def chunk_sums(logits_UV: Tensor, *, local_U: Tensor, owned_U: Tensor, temperature: float) -> Tensor:
    """Statistics [R=4, U] of this rank's slice: peak, sum of e^x, sum of x e^x, target logit over the temperature.

    The first three are those of softmax_sums. A rank without rows returns NO_LOGIT and zeros, which change no sum.

    Args:
        local_U: int64; the index of each target among this rank's rows. Any index if another rank holds the target.
        owned_U: bool; True if this rank holds the target.
    """
    dtype = stat_dtype(logits_UV.dtype)
    if logits_UV.shape[1] == 0:
        return torch.stack([torch.full_like(local_U, NO_LOGIT, dtype=dtype), *logits_UV.new_zeros(3, len(local_U))])
    sums = _for_device(softmax_sums, logits_UV)(logits_UV, temperature=temperature)
    return torch.stack([*sums, torch.where(owned_U, _target_logits(logits_UV, local_U) / temperature, 0.0)])


def chunk_gradient(
    logits_UV: Tensor,
    logsumexp_U: Tensor,
    grad_logp_U: Tensor,
    entropy_U: Tensor | None,
    grad_entropy_U: Tensor | None,
    *,
    local_U: Tensor,
    owned_U: Tensor,
    temperature: float,
) -> Tensor:
    """Computes the gradient [U, V] of sum_U(grad_logp logp + grad_entropy entropy) by the logits, in their dtype.

    Args:
        logsumexp_U: over the whole vocabulary.
        entropy_U, grad_entropy_U: both None if the entropy has no gradient.
        local_U, owned_U: as in chunk_sums.
    """
    grads = (grad_logp_U, entropy_U, grad_entropy_U)
    target_logp_U = _target_logits(logits_UV, local_U) / temperature - logsumexp_U
    own_U = target_gradient(target_logp_U, *grads, temperature=temperature).to(logits_UV.dtype)
    grad_UV = _for_device(logit_gradient, logits_UV)(logits_UV, logsumexp_U, *grads, temperature=temperature)
    # Replaced rather than added to: where p is near one, a rounded -p plus 1 is nothing but rounding error.
    other_U = grad_UV.gather(1, local_U[:, None])[:, 0]
    return grad_UV.scatter_(1, local_U[:, None], torch.where(owned_U, own_U, other_U)[:, None])


def chunk_divergence(
    logits_UV: Tensor,
    perturbed_logits_UV: Tensor,
    logsumexp_U: Tensor,
    perturbed_logsumexp_U: Tensor,
    *,
    kind: Divergence,
    temperature: float,
) -> Tensor:
    """Computes this slice's part [U] of the divergence between the two views; see divergence_sum."""
    run = _for_device(divergence_sum, logits_UV)
    return run(logits_UV, perturbed_logits_UV, logsumexp_U, perturbed_logsumexp_U, kind=kind, temperature=temperature)


def add_product(sum_Vh: Tensor, left_VU: Tensor, right_Uh: Tensor) -> None:
    """Adds left @ right to the sum, in place.

    Where torch can, it does so in one kernel, without rounding the product to a narrower dtype first.
    """
    if sum_Vh.dtype == left_VU.dtype:
        sum_Vh.addmm_(left_VU, right_Uh)
    elif _can_add_wider(sum_Vh.device, left_VU.dtype, sum_Vh.dtype):
        torch.addmm(sum_Vh, left_VU, right_Uh, out_dtype=sum_Vh.dtype, out=sum_Vh)
    else:
        sum_Vh += left_VU @ right_Uh


# --- Passes over every logit ------------------------------------------------------------------------------------------


def softmax_sums(logits_UV: Tensor, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the peak of the logits over the temperature, and the sums over V of e^x and of x e^x.

    x is the distance of a logit from the peak, never positive. Log-sum-exp and entropy follow from the three, also for
    several slices of the vocabulary together:
        logsumexp = peak + log sum e^x,    entropy = log sum e^x - (sum x e^x) / (sum e^x).
    """
    x_UV = _scaled(logits_UV, temperature)
    peak_U = x_UV.amax(1)
    x_UV.sub_(peak_U[:, None])
    exp_UV = x_UV.exp()
    return peak_U, exp_UV.sum(1), exp_UV.mul_(x_UV).sum(1)


def logit_gradient(
    logits_UV: Tensor,
    logsumexp_U: Tensor,
    grad_logp_U: Tensor,
    entropy_U: Tensor | None,
    grad_entropy_U: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """Returns the result of chunk_gradient, except at the targets.

    With p the probabilities: -p (grad_logp + grad_entropy (log p + entropy)) / temperature.
    """
    logp_UV = _scaled(logits_UV, temperature).sub_(logsumexp_U[:, None])
    grad_UV = logp_UV.exp()
    if entropy_U is None or grad_entropy_U is None:
        grad_UV.mul_((-grad_logp_U / temperature)[:, None])
    else:
        weight_UV = logp_UV.add_(entropy_U[:, None]).mul_(grad_entropy_U[:, None]).add_(grad_logp_U[:, None])
        grad_UV.mul_(weight_UV.mul_(-1 / temperature))
    return grad_UV.to(logits_UV.dtype)


def target_gradient(
    target_logp_U: Tensor,
    grad_logp_U: Tensor,
    entropy_U: Tensor | None,
    grad_entropy_U: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """Returns the result of chunk_gradient at the targets: as elsewhere, with 1 - p in place of the -p of grad_logp."""
    grad_U = -torch.expm1(target_logp_U) * grad_logp_U
    if entropy_U is not None and grad_entropy_U is not None:
        grad_U = grad_U - target_logp_U.exp() * (target_logp_U + entropy_U) * grad_entropy_U
    return grad_U / temperature


def divergence_sum(
    logits_UV: Tensor,
    perturbed_logits_UV: Tensor,
    logsumexp_U: Tensor,
    perturbed_logsumexp_U: Tensor,
    *,
    kind: Divergence,
    temperature: float,
) -> Tensor:
    """Computes this slice's part [U] of the divergence between the two views' distributions."""
    logp_UV = _scaled(logits_UV, temperature).sub_(logsumexp_U[:, None])
    perturbed_logp_UV = _scaled(perturbed_logits_UV, temperature).sub_(perturbed_logsumexp_U[:, None])
    return DIVERGENCES[kind](logp_UV, perturbed_logp_UV)


# --- The way they run -------------------------------------------------------------------------------------------------


def _for_device(function: Callable[..., Any], logits_UV: Tensor) -> Callable[..., Any]:
    """Returns the pass, compiled unless the logits are on a CPU, where compiling takes longer than it ever saves."""
    return function if logits_UV.device.type == "cpu" else compiled(function)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the pass as one kernel.

    torch compiles it at the first call, and once more when the number of positions first changes; that code serves
    every number of positions above one. Vocabulary slice, dtype and the numbers are constants of the compiled code.
    """
    return torch.compile(function, fullgraph=True)


@cache
def _can_add_wider(device: torch.device, factors: torch.dtype, total: torch.dtype) -> bool:
    """Returns True if torch can multiply and add to a sum of a wider dtype in one kernel; found out by trying.

    It can on CUDA alone, and not in older versions.
    """
    ones, total_ones = torch.ones(16, 16, dtype=factors, device=device), torch.ones(16, 16, dtype=total, device=device)
    try:
        torch.addmm(total_ones, ones, ones, out_dtype=total, out=total_ones)
        return bool((total_ones == 17.0).all())  # fails on meta, where a dry run comes by
    except (NotImplementedError, RuntimeError, TypeError):
        return False


def _scaled(logits_UV: Tensor, temperature: float) -> Tensor:
    """Returns a new tensor, so that the passes may work in place on it."""
    return logits_UV.to(stat_dtype(logits_UV.dtype)).div(temperature)


def _target_logits(logits_UV: Tensor, index_U: Tensor) -> Tensor:
    return logits_UV.gather(1, index_U[:, None])[:, 0].to(stat_dtype(logits_UV.dtype))
