"""Metrics of VPPO's decisions, under the names of VPPO-RL, so that dashboards overlay.

Shape suffix legend: B = responses; T = response tokens, right-padded; N = response tokens, flat.
"""

from __future__ import annotations

from torch import Tensor

from megatron_vppo.algorithm.shaping import TrajectoryScale


def advantage_metrics(advantage_BT: Tensor, trained_BT: Tensor) -> dict[str, float]:
    """Computes mean, maximum and minimum of the shaped advantages over the trained tokens; empty if there are none."""
    advantage_N = advantage_BT[trained_BT.bool()]
    if len(advantage_N) == 0:
        return {}
    return {
        "critic/advantages/mean": advantage_N.mean().item(),
        "critic/advantages/max": advantage_N.max().item(),
        "critic/advantages/min": advantage_N.min().item(),
    }


def minibatch_metrics(
    dependency_BT: Tensor | None,
    token_mask_BT: Tensor,
    trained_BT: Tensor,
    mask_BT: Tensor,
    dependency_mean_B: Tensor | None,
    scale: TrajectoryScale,
    *,
    correction_BT: Tensor | None,
) -> dict[str, float]:
    """Means over the trained tokens and rows; a metric without any such token or row is left out.

    `low_var_kl` in a name stands for the dependency of whichever kind is set, in nats. The threshold is the mean over
    responses of the smallest dependency that was kept. Statistics of several shaping scopes are averaged over scopes.

    Args:
        trained_BT: [B, T], 1 on tokens of responses that are trained on.
        mask_BT: [B, T], 1 on all response tokens.
        correction_BT: [B, T], importance weights; None if the rollouts are not corrected.
    """
    metrics: dict[str, float] = {}
    rows_B = trained_BT.sum(1) > 0
    metrics["actor/trained_row_fraction"] = rows_B.float().mean().item()
    if not bool(rows_B.any()):
        return metrics
    kept_BT = (token_mask_BT * trained_BT).bool()
    rejected_BT = trained_BT.bool() & ~kept_BT
    metrics["actor/perception_token_fraction"] = (kept_BT.sum() / trained_BT.sum()).item()
    if correction_BT is not None:
        metrics["actor/rollout_correction_mean"] = (correction_BT.sum() / mask_BT.sum()).item()
    if dependency_BT is None or dependency_mean_B is None:
        return metrics
    metrics["actor/low_var_kl_mean_selected"] = dependency_BT[kept_BT].mean().item()
    if bool(rejected_BT.any()):
        metrics["actor/low_var_kl_mean_rejected"] = dependency_BT[rejected_BT].mean().item()
    smallest_kept_B = dependency_BT.masked_fill(~kept_BT, float("inf")).amin(1)
    metrics["actor/low_var_kl_threshold"] = smallest_kept_B[rows_B].mean().item()
    metrics["actor/sensitivity_score_mean"] = dependency_mean_B[rows_B].mean().item()
    metrics["actor/scaling_factor_mean"] = scale.scale_B[rows_B].mean().item()
    for name, values in (
        ("actor/global_sensitivity_score_min", scale.smallest_means),
        ("actor/global_sensitivity_score_max", scale.largest_means),
        ("actor/dynamic_scaling_max", scale.target_maxima),
    ):
        if values:
            metrics[name] = sum(values) / len(values)
    return metrics
