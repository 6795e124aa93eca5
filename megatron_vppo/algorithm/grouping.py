"""Which groups are trained on, what an answer is worth within its group, and the authors' split of rows.

Shape suffix legend: B = responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STD_EPS = 1e-6


def keep_group(accuracies: Sequence[float], *, low: float, high: float) -> bool:
    """True where the mean accuracy of a group lies strictly between low and high: it holds a learning signal (DAPO).

    Args:
        accuracies: in [0, 1], one per response of the group.
    """
    if not accuracies:
        raise ValueError("a group without responses cannot be judged; drop it before filtering")
    return low < sum(accuracies) / len(accuracies) < high


def group_advantages(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """GRPO (paper Eq. 1): reward minus the mean of its group, over the group's unbiased deviation plus 1e-6.

    Args:
        reward_B: [B] float32.
        group_B: [B] int64; equal numbers mark the responses of one prompt. Groups may have any sizes above one.

    Returns:
        [B], dtype of the rewards.

    Raises:
        ValueError: a group has one response, of which no deviation can be taken.
    """
    advantage_B = torch.empty_like(reward_B)
    for group in sorted(set(group_B.tolist())):
        rows_B = group_B == group
        rewards = reward_B[rows_B]
        if rewards.numel() < 2:
            raise ValueError(f"group {group} has 1 response; group advantages need at least 2 (set rollout.n >= 2)")
        advantage_B[rows_B] = (rewards - rewards.mean()) / (rewards.std() + STD_EPS)
    return advantage_B


def emulated_split(num_rows: int, *, devices: int, micro_batch_size: int) -> tuple[Tensor, Tensor]:
    """Which device and which micro-batch each row of a mini-batch would fall to, for the authors' shaping scopes.

    Rows stay in the given order: each device takes a contiguous block (sizes differ by at most one where they do not
    divide evenly, and are one or none where there are more devices than rows), and within a device each micro-batch
    takes micro_batch_size rows, the last what is left. The authors first balance rows over devices by length; which
    rows meet on a device is not reproduced, only how many.

    Returns:
        device_B, micro_batch_B: [B] int64; micro-batch numbers are unique over devices.
    """
    if devices < 1 or micro_batch_size < 1:
        raise ValueError(f"devices is {devices} and micro_batch_size {micro_batch_size}; set both to at least 1")
    row_B = torch.arange(num_rows)
    device_B = row_B * devices // num_rows
    first_row_B = -(-device_B * num_rows // devices)
    return device_B, device_B * num_rows + (row_B - first_row_B) // micro_batch_size
