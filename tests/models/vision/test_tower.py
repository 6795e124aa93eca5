"""Positions of patches in the processor's order, against transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids

from megatron_vppo.models.vision.tower import patch_positions


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 10, 6), (1, 2, 2), (2, 4, 10), (1, 30, 26)], ids=str)
def test_patch_positions(grid: tuple[int, int, int]) -> None:
    assert torch.equal(patch_positions(grid, merge=2), get_vision_position_ids(torch.tensor([grid]), 2))
