"""Advantages of responses, from their rewards.

Shape suffix legend: B = responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vppo.config.choices import AdvantageKind

STD_EPS = 1e-6


def advantages(reward_B: Tensor, group_B: Tensor, *, kind: AdvantageKind) -> Tensor:
    """Computes the advantage of each response of a step.

    With the reward r, and mean and unbiased deviation over the n responses of its group or over the step:

        grpo                    (r - group mean) / (group deviation + 1e-6)       arXiv 2402.03300; VPPO's Eq. 1
        dr_grpo                 r - group mean                                    arXiv 2503.20783
        rloo                    r - mean of the n - 1 others                      arXiv 2402.14740
        reinforce_pp            (r - step mean) / (step deviation + 1e-6)         arXiv 2501.03262
        reinforce_pp_baseline   a / (step deviation of a + 1e-6), a = r - group mean; the same paper's variant

    The last two take statistics over all responses of the step's groups, each of which counts once.

    Args:
        reward_B: [B] float32.
        group_B: [B] int64; equal numbers mark the responses of one prompt. A group has two responses or more.

    Returns:
        [B] in the dtype of the rewards.

    Raises:
        ValueError: a group has one response, which has no deviation.
    """
    if kind == "grpo":
        return group_advantages(reward_B, group_B)
    centred_B, size_B = _centred(reward_B, group_B)
    if kind == "dr_grpo":
        return centred_B
    if kind == "rloo":
        return centred_B * size_B / (size_B - 1)
    if kind == "reinforce_pp":
        return (reward_B - reward_B.mean()) / (reward_B.std() + STD_EPS)
    if kind == "reinforce_pp_baseline":
        return centred_B / (centred_B.std() + STD_EPS)
    raise ValueError(f"advantage is {kind!r}; set it to 'grpo', 'dr_grpo', 'rloo', 'reinforce_pp' or its '_baseline'")


def group_advantages(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """Computes GRPO's advantages: the reward minus the mean of its group, divided by the group's unbiased deviation
    plus 1e-6. Arguments and errors are those of `advantages`.
    """
    centred_B, _ = _centred(reward_B, group_B)
    deviation_B = torch.empty_like(reward_B)
    for group in sorted(set(group_B.tolist())):
        rows_B = group_B == group
        deviation_B[rows_B] = reward_B[rows_B].std()
    return centred_B / (deviation_B + STD_EPS)


def _centred(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rewards minus the mean of their group, and the sizes of the groups; [B] each."""
    centred_B, size_B = torch.empty_like(reward_B), torch.empty_like(reward_B)
    for group in sorted(set(group_B.tolist())):
        rows_B = group_B == group
        rewards = reward_B[rows_B]
        if rewards.numel() < 2:
            raise ValueError(f"group {group} has 1 response; group advantages need at least 2 (set rollout.n >= 2)")
        centred_B[rows_B] = rewards - rewards.mean()
        size_B[rows_B] = float(rewards.numel())
    return centred_B, size_B
