"""The tokens that get gradient."""

from __future__ import annotations

import torch

from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.token_filter import top_token_mask


def test_padding_is_never_ranked() -> None:
    """Whatever stands there: larger, not a number, or larger only than negative dependencies."""
    dependency_BT = torch.tensor([[-1.0, -2.0, -3.0, 9.0, float("nan"), 0.0]])
    mask_BT = length_mask([3], width=6)
    kept_BT = top_token_mask(dependency_BT, mask_BT, keep_fraction=0.5, stable=True, integer_ceil=True)
    assert kept_BT.tolist() == [[1, 1, 0, 0, 0, 0]]
