"""Batches whose parts contradict one another are refused."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing


def test_inconsistent_batches_are_refused() -> None:
    ids, none = torch.arange(4), torch.zeros(0, dtype=torch.int64)
    positions = ids.expand(3, 4)
    with pytest.raises(ValueError, match="sum to the 4 tokens"):
        PackedBatch(ids, positions, Packing((3,)), none, none)
    with pytest.raises(ValueError, match=r"expected \(3, 4\)"):
        PackedBatch(ids, positions[:, :3], Packing((4,)), none, none)
    with pytest.raises(ValueError, match="1 image tokens but 0 features"):
        PackedBatch(ids, positions, Packing((4,)), torch.tensor([1]), none)
