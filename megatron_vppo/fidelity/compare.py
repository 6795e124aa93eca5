"""What another precision of scoring changes in VPPO's decisions about the same responses.

Both precisions go through `assemble`, so that what is compared is what training would do. Shape suffix legend: B =
responses, T = response tokens (right-padded), N = any number of values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.settings import VppoSettings
from megatron_vppo.algorithm.types import GradedResponse, Response, Reward, Scores


@dataclass(frozen=True, slots=True)
class Decisions:
    """What VPPO makes of one scoring of responses that have an image each."""

    logp_BT: Tensor
    perturbed_logp_BT: Tensor
    """fp32 nats, given the original and the perturbed picture."""
    dependency_BT: Tensor
    """fp32 nats; 0.0 where padded."""
    kept_BT: Tensor
    """bool; tokens that carry policy gradient."""
    dependency_mean_B: Tensor
    """fp32 nats."""
    scale_B: Tensor
    """fp32; alpha of the advantage."""


@dataclass(frozen=True, slots=True)
class Differences:
    """Another precision against the baseline. N are the response tokens, in row order."""

    logp_N: Tensor
    perturbed_logp_N: Tensor
    """Nats, absolute."""
    dependency_N: Tensor
    """Nats, other minus baseline."""
    spearman: float
    """Rank correlation of the dependency over all tokens."""
    spearman_B: Tensor
    """float64, per response; NaN where all of its tokens depend equally in one precision, or it has one token."""
    overlap: float
    """Share of all kept tokens that the other precision keeps too."""
    overlap_B: Tensor
    lost_dependency: float
    """Share of the kept tokens' dependency in the baseline that is on tokens which the other precision does not keep:
    those at the edge of being kept may carry next to none."""
    dependency_mean_B: Tensor
    """Nats, other minus baseline."""
    scale_B: Tensor
    """Other minus baseline."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of magnitudes."""

    mean: float
    p50: float
    p99: float
    largest: float


def decisions(
    responses: Sequence[Response],
    scores: Scores,
    *,
    settings: VppoSettings,
    responses_per_minibatch: int,
    micro_batch_size: int,
) -> Decisions:
    """Filter and shaping of the settings' own kind, switched on where the settings leave them out.

    Args:
        responses: each with an image; those of one group next to each other.
        scores: of both views.

    Raises:
        ValueError, RuntimeError: see `assemble`.
    """
    assert scores.perturbed_logp_BT is not None, "both views are scored"
    unrewarded = Reward(overall=0.0, accuracy=0.0, metrics={})  # nothing that is compared looks at rewards
    minibatches = assemble(
        [GradedResponse(response, "", unrewarded) for response in responses],
        scores,
        settings=dataclasses.replace(settings, use_vppo_on_perception=True, use_advantage_shaping=True),
        responses_per_minibatch=responses_per_minibatch,
        micro_batch_size=micro_batch_size,
    )
    records = [minibatch.record for minibatch in minibatches]
    return Decisions(
        logp_BT=scores.old_logp_BT,
        perturbed_logp_BT=scores.perturbed_logp_BT,
        dependency_BT=torch.cat([record.dependency_BT for record in records if record.dependency_BT is not None]),
        kept_BT=torch.cat([record.token_mask_BT for record in records]).bool(),
        dependency_mean_B=torch.cat([r.dependency_mean_B for r in records if r.dependency_mean_B is not None]),
        scale_B=torch.cat([record.scale_B for record in records]),
    )


def compare(baseline: Decisions, other: Decisions, responses: Sequence[Response]) -> Differences:
    """Of decisions about the same responses."""
    lengths = [len(response.token_ids) for response in responses]
    mask_BT = length_mask(lengths, width=baseline.logp_BT.shape[1]).bool()
    both_BT, weight_BT = baseline.kept_BT & other.kept_BT, baseline.dependency_BT.double()
    pairs = [
        (baseline.dependency_BT[row, :length], other.dependency_BT[row, :length]) for row, length in enumerate(lengths)
    ]
    return Differences(
        logp_N=(other.logp_BT - baseline.logp_BT)[mask_BT].abs(),
        perturbed_logp_N=(other.perturbed_logp_BT - baseline.perturbed_logp_BT)[mask_BT].abs(),
        dependency_N=(other.dependency_BT - baseline.dependency_BT)[mask_BT],
        spearman=spearman(baseline.dependency_BT[mask_BT], other.dependency_BT[mask_BT]),
        spearman_B=torch.tensor([spearman(*pair) for pair in pairs], dtype=torch.float64),
        overlap=(both_BT.sum() / baseline.kept_BT.sum()).item(),
        overlap_B=both_BT.sum(1) / baseline.kept_BT.sum(1),
        lost_dependency=(weight_BT[baseline.kept_BT & ~other.kept_BT].sum() / weight_BT[baseline.kept_BT].sum()).item(),
        dependency_mean_B=other.dependency_mean_B - baseline.dependency_mean_B,
        scale_B=other.scale_B - baseline.scale_B,
    )


def spread(value_N: Tensor) -> Spread:
    """Of |value|; percentiles are values that occur: the smallest that so many per cent do not exceed."""
    ordered_N = value_N.abs().double().sort().values
    count = len(ordered_N)

    def percentile(per_cent: int) -> float:
        return ordered_N[-(-count * per_cent // 100) - 1].item()

    return Spread(ordered_N.mean().item(), percentile(50), percentile(99), ordered_N[-1].item())


def spearman(left_N: Tensor, right_N: Tensor) -> float:
    """Correlation of average ranks; NaN where the values of a side are all equal."""
    left, right = average_ranks(left_N), average_ranks(right_N)
    left, right = left - left.mean(), right - right.mean()
    return ((left * right).sum() / (left.square().sum() * right.square().sum()).sqrt()).item()


def average_ranks(value_N: Tensor) -> Tensor:
    """float64 [N], from 1; equal values share the mean of their ranks."""
    ordered_N = value_N.sort().values
    smaller_N, not_larger_N = (torch.searchsorted(ordered_N, value_N, right=right) for right in (False, True))
    return (smaller_N + 1 + not_larger_N).double() / 2
