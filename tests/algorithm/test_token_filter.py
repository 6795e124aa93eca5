"""The tokens that get gradient."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.token_filter import kept_counts, top_token_mask


def test_padding_is_never_ranked() -> None:
    """Whatever stands there: larger, not a number, or larger only than negative dependencies."""
    dependency_BT = torch.tensor([[-1.0, -2.0, -3.0, 9.0, float("nan"), 0.0]])
    mask_BT = length_mask([3], width=6)
    kept_BT = top_token_mask(dependency_BT, mask_BT, keep_fraction=0.5, stable=True, integer_ceil=True)
    assert kept_BT.tolist() == [[1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("integer_ceil", [True, False])
def test_a_fraction_of_one_keeps_everything(integer_ceil: bool) -> None:
    assert kept_counts(torch.tensor([0, 1, 7]), keep_fraction=1.0, integer_ceil=integer_ceil).tolist() == [0, 1, 7]
