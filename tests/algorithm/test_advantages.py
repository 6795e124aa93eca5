"""Advantages within groups: what is refused, and what has none."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.advantages import group_advantages


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group 4 has 1 response"):
        group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3, 3, 4]))


def test_equal_rewards_have_no_advantage() -> None:
    assert group_advantages(torch.ones(4), torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4
