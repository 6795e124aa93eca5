"""The figures of fidelity.json: what was measured, and how far a precision is from the baseline.

Shape suffix legend: B = responses; T = response tokens (right-padded); N = response tokens, flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import Response
from megatron_vppo.config.schema import RunConfig
from megatron_vppo.fidelity.compare import Decisions, Differences, spread

LOGP_EDGES = torch.logspace(-8, 1, 37, dtype=torch.float64)
"""Nats, as below; the outer bins also hold what lies beyond them."""
DEPENDENCY_EDGES = torch.logspace(-16, 1, 52, dtype=torch.float64)
"""They reach lower: small dependencies go with the square of log-probs."""
SHARE_EDGES = torch.linspace(0, 1, 21, dtype=torch.float64)


def subject_figures(config: RunConfig, responses: Sequence[Response], baseline: Decisions) -> dict[str, Any]:
    """Returns the model, the settings and the responses that precisions are compared on."""
    rows = zip(baseline.dependency_BT, responses, strict=True)
    dependency_N = torch.cat([row_T[: len(response.token_ids)] for row_T, response in rows])
    return {
        "model": config.model.path,
        "baseline_dtype": config.model.dtype,
        "bf16_layers_at_ends": config.fp8.bf16_layers_at_ends,
        "split": responses[0].prompt.split,
        "prompts": len({response.group_id for response in responses}),
        "responses": len(responses),
        "tokens": len(dependency_N),
        "dependency": config.algorithm.dependency,
        "dependency_median": spread(dependency_N).p50,
        "top_p_perception_tokens": config.algorithm.top_p_perception_tokens,
        "scale_largest": baseline.scale_B.max().item(),
    }


def difference_figures(found: Differences) -> dict[str, Any]:
    """Summaries and histograms of what another precision changes."""
    ranked_B = found.spearman_B[found.spearman_B.isfinite()]
    return {
        "logp": asdict(spread(found.logp_N)),
        "masked_logp": asdict(spread(found.perturbed_logp_N)),
        "dependency": asdict(spread(found.dependency_N)),
        "spearman": _finite(found.spearman),
        "spearman_per_response": _finite(ranked_B.mean().item()),
        "responses_ranked": len(ranked_B),
        "overlap": found.overlap,
        "overlap_per_response": found.overlap_B.mean().item(),
        "lost_dependency": _finite(found.lost_dependency),
        "overlap_least": found.overlap_B.min().item(),
        "trajectory_score": asdict(spread(found.dependency_mean_B)),
        "scale": asdict(spread(found.scale_B)),
        "histograms": {
            "logp_edges": LOGP_EDGES.tolist(),
            "dependency_edges": DEPENDENCY_EDGES.tolist(),
            "overlap_edges": SHARE_EDGES.tolist(),
            "logp": _counts(found.logp_N, LOGP_EDGES),
            "masked_logp": _counts(found.perturbed_logp_N, LOGP_EDGES),
            "dependency_up": _counts(found.dependency_N[found.dependency_N > 0], DEPENDENCY_EDGES),
            "dependency_down": _counts(-found.dependency_N[found.dependency_N <= 0], DEPENDENCY_EDGES),
            "overlap": _counts(found.overlap_B, SHARE_EDGES),
        },
    }


def _counts(values: Tensor, edges: Tensor) -> list[int]:
    """Counts the values in each bin. An edge belongs to the bin above it, the last edge to the last bin."""
    bins = len(edges) - 1
    bin_of_value = (torch.bucketize(values.double(), edges, right=True) - 1).clamp(0, bins - 1)
    counts: list[int] = torch.bincount(bin_of_value, minlength=bins).tolist()
    return counts


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
