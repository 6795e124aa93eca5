"""Positions of patches in the processor's order, against transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids

from megatron_vppo.models.vision.tower import block_positions, patch_positions


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 10, 6), (1, 2, 2), (2, 4, 10), (1, 30, 26)], ids=str)
def test_patch_positions(grid: tuple[int, int, int]) -> None:
    found = patch_positions(block_positions(grid, merge=2), merge=2)
    assert torch.equal(found, get_vision_position_ids(torch.tensor([grid]), 2))
