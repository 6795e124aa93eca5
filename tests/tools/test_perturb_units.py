"""The figures of the measurement of perturbation units, against numbers worked out by hand."""

from __future__ import annotations

import torch
from bench.perturb_units import correlation, overlap, within_groups


def test_overlap_is_the_share_of_tokens_that_both_keep() -> None:
    a_BT, b_BT = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0]])
    assert overlap(a_BT, b_BT) == overlap(b_BT, a_BT) == torch.tensor(2 / 3).item()


def test_correlation_within_groups_does_not_see_what_groups_have_in_common() -> None:
    group_B = torch.tensor([0, 0, 1, 1])
    a_B, b_B = torch.tensor([1.0, 2.0, 11.0, 12.0]), torch.tensor([2.0, 1.0, 12.0, 11.0])
    assert within_groups(a_B, group_B).tolist() == [-0.5, 0.5, -0.5, 0.5]
    assert correlation(a_B, b_B) > 0.9
    assert abs(correlation(within_groups(a_B, group_B), within_groups(b_B, group_B)) + 1) < 1e-12
