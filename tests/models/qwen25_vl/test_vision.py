"""The window order of Qwen2.5-VL's tower, against transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from megatron_vppo.models.qwen25_vl.vision import window_order


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 10, 6), (1, 2, 2), (1, 6, 14), (2, 4, 10), (1, 30, 26)], ids=str)
@pytest.mark.parametrize("window", [56, 112])
def test_window_order(grid: tuple[int, int, int], window: int) -> None:
    order = window_order(grid, merge=2, window_blocks=window // 2 // 14)
    grids = torch.tensor([grid])
    index, boundaries = get_vision_window_index(grids, spatial_merge_size=2, window_size=window, patch_size=14)
    assert torch.equal(order.block_order_M, index)
    assert list(order.window_lengths) == boundaries.diff().tolist()
