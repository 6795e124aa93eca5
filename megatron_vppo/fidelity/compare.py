"""Compares VPPO's decisions about the same responses between two precisions of scoring.

Both precisions go through `assemble`, so that what is compared is what training would do.

Shape suffix legend: B = responses; T = response tokens (right-padded); N = response tokens, flat.
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
    """VPPO's decisions from one scoring of responses that have an image each."""

    logp_BT: Tensor
    perturbed_logp_BT: Tensor
    """fp32 nats, given the original and the perturbed image."""
    dependency_BT: Tensor
    """fp32 nats; 0.0 where padded."""
    kept_BT: Tensor
    """bool; the tokens that carry policy gradient."""
    dependency_mean_B: Tensor
    """fp32 nats."""
    scale_B: Tensor
    """fp32; the factor on the advantage, alpha in the paper."""


@dataclass(frozen=True, slots=True)
class Differences:
    """The differences of another precision from the baseline. Response tokens are in row order."""

    logp_N: Tensor
    perturbed_logp_N: Tensor
    """Absolute differences, nats."""
    dependency_N: Tensor
    """Nats, other minus baseline."""
    spearman: float
    """Rank correlation of the dependency between the precisions, over all tokens."""
    spearman_B: Tensor
    """float64; the same for each response. NaN if it has one token, or in one precision all of its tokens depend
    equally."""
    overlap: float
    """Share of the baseline's kept tokens that the other precision keeps too."""
    overlap_B: Tensor
    """The same for each response."""
    lost_dependency: float
    """Share of the kept tokens' dependency, in the baseline, that lies on tokens which the other precision does not
    keep. It may be small where `overlap` is not: tokens at the edge of being kept carry next to no dependency."""
    dependency_mean_B: Tensor
    """Nats, other minus baseline."""
    scale_B: Tensor
    """Other minus baseline."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Statistics of absolute values."""

    mean: float
    p50: float
    p99: float
    largest: float


def decide(
    responses: Sequence[Response],
    scores: Scores,
    *,
    settings: VppoSettings,
    responses_per_minibatch: int,
    micro_batch_size: int,
) -> Decisions:
    """Makes VPPO's decisions about responses.

    The token filter and the shaping are on, whether or not the settings use them.

    Args:
        responses: each with an image; those of one group next to each other.
        scores: log-probs of both views.

    Raises:
        ValueError, RuntimeError: see `assemble`.
    """
    assert scores.perturbed_logp_BT is not None, "both views are scored"
    no_reward = Reward(overall=0.0, accuracy=0.0, metrics={})  # nothing that is compared looks at rewards
    minibatches = assemble(
        [GradedResponse(response, "", no_reward) for response in responses],
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
    """Computes the differences between decisions about the same responses."""
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


def spread(values: Tensor) -> Spread:
    """Computes mean, median, 99th percentile and maximum of |value|.

    Percentiles are nearest-rank, so each is an observed value.

    Args:
        values: one-dimensional, not empty.
    """
    ordered = values.abs().double().sort().values
    count = len(ordered)

    def percentile(per_cent: int) -> float:
        return ordered[-(-count * per_cent // 100) - 1].item()

    return Spread(ordered.mean().item(), percentile(50), percentile(99), ordered[-1].item())


def spearman(left: Tensor, right: Tensor) -> float:
    """Computes Spearman's rank correlation, with average ranks; NaN if all values of one side are equal."""
    left, right = average_ranks(left), average_ranks(right)
    left, right = left - left.mean(), right - right.mean()
    return ((left * right).sum() / (left.square().sum() * right.square().sum()).sqrt()).item()


def average_ranks(values: Tensor) -> Tensor:
    """Ranks values from 1, as float64. Equal values share the mean of their ranks."""
    ordered = values.sort().values
    smaller, not_larger = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (smaller + 1 + not_larger).double() / 2
