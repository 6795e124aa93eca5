"""Advantages within groups: what is refused, and what has none."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.advantages import advantages, group_advantages
from megatron_vppo.config.choices import AdvantageKind


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group 4 has 1 response"):
        group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3, 3, 4]))


def test_equal_rewards_have_no_advantage() -> None:
    assert group_advantages(torch.ones(4), torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4


REWARDS, GROUPS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 7, 2, 2])
THIRD = 1 / 3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # The first group: mean 1/3, unbiased deviation sqrt(1/3). The second: mean 1, no deviation.
        ("grpo", [2 * THIRD / THIRD**0.5, -THIRD / THIRD**0.5, -THIRD / THIRD**0.5, 0, 0]),
        ("dr_grpo", [2 * THIRD, -THIRD, -THIRD, 0, 0]),
        ("rloo", [1.0, -0.5, -0.5, 0, 0]),  # less the mean of the others
        # The step: mean 0.6, unbiased deviation sqrt(0.3).
        ("reinforce_pp", [0.4 / 0.3**0.5, -0.6 / 0.3**0.5, -0.6 / 0.3**0.5, 0.4 / 0.3**0.5, 0.4 / 0.3**0.5]),
        # Squares of what dr_grpo gives: 6/9 in all, over 4 degrees of freedom.
        ("reinforce_pp_baseline", [2 * THIRD / 6**-0.5, -THIRD / 6**-0.5, -THIRD / 6**-0.5, 0, 0]),
    ],
)
def test_advantages_by_hand(kind: AdvantageKind, expected: list[float]) -> None:
    assert advantages(REWARDS, GROUPS, kind=kind).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="advantage is 'gae'"):
        advantages(REWARDS, GROUPS, kind="gae")  # type: ignore[arg-type]
