"""Advantages of responses within their group.

Shape suffix legend: B = responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPS = 1e-6


def group_advantages(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """Computes GRPO's advantages (paper Eq. 1): the reward minus the mean of its group, divided by the group's unbiased
    deviation plus 1e-6.

    Args:
        reward_B: [B] float32.
        group_B: [B] int64; equal numbers mark the responses of one prompt. A group has two responses or more.

    Returns:
        [B] in the dtype of the rewards.

    Raises:
        ValueError: a group has one response, which has no deviation.
    """
    advantage_B = torch.empty_like(reward_B)
    for group in sorted(set(group_B.tolist())):
        rows_B = group_B == group
        rewards = reward_B[rows_B]
        if rewards.numel() < 2:
            raise ValueError(f"group {group} has 1 response; group advantages need at least 2 (set rollout.n >= 2)")
        advantage_B[rows_B] = (rewards - rewards.mean()) / (rewards.std() + STD_EPS)
    return advantage_B
