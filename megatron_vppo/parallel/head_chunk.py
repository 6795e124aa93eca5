"""One chunk of the vocabulary head: its logits, what is read off them, their gradient.

Besides the matrix products, every logit is touched by three functions only: `softmax_sums`, `logit_gradient` and
`divergence_sum`. On CPU they run as they stand. On a GPU `torch.compile` makes one kernel of each, which reads the
chunk once or twice in the dtype of the matrix product and writes it at most once; separate operations in float32 would
take longer than the matrix products (docs/adr/0011-fused-head.md).

Shape suffix legend: C = positions of one chunk, V = this rank's vocabulary rows, H = hidden size, R = statistics.
Logits are those of the matrix product, before the temperature; statistics are float32 (float64 for float64 logits), in
nats.
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

# Logit of a banned token, and the largest of a rank that holds only padded vocabulary rows: finite, so that 0 * it
# stays 0.
NO_LOGIT = -1e30


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- what the head does with a chunk


def chunk_logits(hidden_CH: Tensor, weight_VH: Tensor, banned_V: Tensor) -> Tensor:
    """[C, V] in the model's dtype, as the rollout engine computes them.

    Args:
        banned_V: indices of tokens whose logits become NO_LOGIT.
    """
    logits_CV = hidden_CH @ weight_VH.T
    return logits_CV.index_fill_(1, banned_V, NO_LOGIT) if len(banned_V) else logits_CV


def chunk_sums(logits_CV: Tensor, *, local_C: Tensor, owned_C: Tensor, temperature: float) -> Tensor:
    """[R=4, C] of this rank's slice: peak, sum of e^x, sum of x e^x (see softmax_sums), target logit over temperature.

    Args:
        local_C: index of each target among the rows; any where `owned_C` says that another rank holds it.
    """
    dtype = stat_dtype(logits_CV.dtype)
    if logits_CV.shape[1] == 0:
        return torch.stack([torch.full_like(local_C, NO_LOGIT, dtype=dtype), *logits_CV.new_zeros(3, len(local_C))])
    sums = _on_device(softmax_sums, logits_CV)(logits_CV, temperature=temperature)
    return torch.stack([*sums, torch.where(owned_C, _at(logits_CV, local_C) / temperature, 0.0)])


def chunk_gradient(
    logits_CV: Tensor,
    logsumexp_C: Tensor,
    grad_logp_C: Tensor,
    entropy_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    *,
    local_C: Tensor,
    owned_C: Tensor,
    temperature: float,
) -> Tensor:
    """Gradient of sum_C(grad_logp logp + grad_entropy entropy) with respect to the logits, in their dtype [C, V].

    Args:
        entropy_C, grad_entropy_C: None where the entropy has no gradient.
        local_C, owned_C: as in chunk_sums.
    """
    grads = (grad_logp_C, entropy_C, grad_entropy_C)
    target_logp_C = _at(logits_CV, local_C) / temperature - logsumexp_C
    own_C = target_gradient(target_logp_C, *grads, temperature=temperature).to(logits_CV.dtype)
    grad_CV = _on_device(logit_gradient, logits_CV)(logits_CV, logsumexp_C, *grads, temperature=temperature)
    # Replaced rather than added to: where p is near one, a rounded -p plus 1 is nothing but rounding error.
    other_C = grad_CV.gather(1, local_C[:, None])[:, 0]
    return grad_CV.scatter_(1, local_C[:, None], torch.where(owned_C, own_C, other_C)[:, None])


def chunk_divergence(
    logits_CV: Tensor,
    perturbed_logits_CV: Tensor,
    logsumexp_C: Tensor,
    perturbed_logsumexp_C: Tensor,
    *,
    kind: Divergence,
    temperature: float,
) -> Tensor:
    """[C]; see divergence_sum."""
    passed = _on_device(divergence_sum, logits_CV)
    return passed(
        logits_CV, perturbed_logits_CV, logsumexp_C, perturbed_logsumexp_C, kind=kind, temperature=temperature
    )


def add_product(sum_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """sum += left @ right, in one kernel and without rounding the product to a narrower dtype where torch can."""
    if sum_VH.dtype == left_VC.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    elif _adds_wider(sum_VH.device, left_VC.dtype, sum_VH.dtype):
        torch.addmm(sum_VH, left_VC, right_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        sum_VH += left_VC @ right_CH


# ---- passes over every logit


def softmax_sums(logits_CV: Tensor, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """peak_C, the largest logit over the temperature; the sums over V of e^x and of x e^x, where x is what each lies
    below the peak. Log-sum-exp and entropy follow from them, also for several slices of the vocabulary together.
    """
    x_CV = _scaled(logits_CV, temperature)
    peak_C = x_CV.amax(1)
    x_CV.sub_(peak_C[:, None])
    exp_CV = x_CV.exp()
    return peak_C, exp_CV.sum(1), exp_CV.mul_(x_CV).sum(1)


def logit_gradient(
    logits_CV: Tensor,
    logsumexp_C: Tensor,
    grad_logp_C: Tensor,
    entropy_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """What chunk_gradient returns, except at the targets; with p the probabilities:
    -p (grad_logp + grad_entropy (log p + entropy)) / temperature.
    """
    logp_CV = _scaled(logits_CV, temperature).sub_(logsumexp_C[:, None])
    grad_CV = logp_CV.exp()
    if entropy_C is None or grad_entropy_C is None:
        grad_CV.mul_((-grad_logp_C / temperature)[:, None])
    else:
        weight_CV = logp_CV.add_(entropy_C[:, None]).mul_(grad_entropy_C[:, None]).add_(grad_logp_C[:, None])
        grad_CV.mul_(weight_CV.mul_(-1 / temperature))
    return grad_CV.to(logits_CV.dtype)


def target_gradient(
    target_logp_C: Tensor,
    grad_logp_C: Tensor,
    entropy_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """What chunk_gradient returns at the targets: as elsewhere, with 1 - p in place of the -p of grad_logp."""
    grad_C = -torch.expm1(target_logp_C) * grad_logp_C
    if entropy_C is not None and grad_entropy_C is not None:
        grad_C = grad_C - target_logp_C.exp() * (target_logp_C + entropy_C) * grad_entropy_C
    return grad_C / temperature


def divergence_sum(
    logits_CV: Tensor,
    perturbed_logits_CV: Tensor,
    logsumexp_C: Tensor,
    perturbed_logsumexp_C: Tensor,
    *,
    kind: Divergence,
    temperature: float,
) -> Tensor:
    """This slice's part of the divergence between the two views' distributions, [C]."""
    logp_CV = _scaled(logits_CV, temperature).sub_(logsumexp_C[:, None])
    perturbed_logp_CV = _scaled(perturbed_logits_CV, temperature).sub_(perturbed_logsumexp_C[:, None])
    return DIVERGENCES[kind](logp_CV, perturbed_logp_CV)


# ---- how they run


def _on_device(function: Callable[..., Any], logits_CV: Tensor) -> Callable[..., Any]:
    """A pass as it is to run where the logits are. Compiling takes longer than it ever saves on a CPU."""
    return function if logits_CV.device.type == "cpu" else compiled(function)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when first called, and once more when the number of positions first changes: from then on for any
    number but one. Vocabulary slice, dtype and the numbers are constants of the compiled code.
    """
    return torch.compile(function, fullgraph=True)


@cache
def _adds_wider(device: torch.device, factors: torch.dtype, total: torch.dtype) -> bool:
    """Whether torch can multiply and add to a sum of a wider dtype in one kernel: only on CUDA, and older versions take
    no such sum. Found out by trying.
    """
    ones, total_ones = torch.ones(16, 16, dtype=factors, device=device), torch.ones(16, 16, dtype=total, device=device)
    try:
        torch.addmm(total_ones, ones, ones, out_dtype=total, out=total_ones)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return bool((total_ones == 17.0).all())


def _scaled(logits_CV: Tensor, temperature: float) -> Tensor:
    """A new tensor, so that the passes may work in place on it."""
    return logits_CV.to(stat_dtype(logits_CV.dtype)).div(temperature)


def _at(logits_CV: Tensor, index_C: Tensor) -> Tensor:
    return logits_CV.gather(1, index_C[:, None])[:, 0].to(stat_dtype(logits_CV.dtype))
