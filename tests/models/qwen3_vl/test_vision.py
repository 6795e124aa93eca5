"""Position embeddings and segments of Qwen3-VL's tower."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.models.qwen3_vl.vision import segment_lengths, stretch_weights
from tests.models.tiny import tiny_qwen3_config


@pytest.mark.parametrize("count, side", [(1, 6), (2, 6), (10, 6), (6, 6), (7, 48), (60, 48)])
def test_stretch_is_torchs_interpolation(count: int, side: int) -> None:
    points = torch.randn(1, 3, side, generator=torch.Generator().manual_seed(count))
    expected = torch.nn.functional.interpolate(points, size=count, mode="linear", align_corners=True)
    assert (
        points[0] @ stretch_weights(count, side=side, device=torch.device("cpu")).T - expected[0]
    ).abs().max() < 1e-5


def test_segments_of_the_qwen3_tower() -> None:
    for taps, lengths in {(): (3,), (0, 2): (1, 2), (1,): (2, 1), (0, 1): (1, 1, 1)}.items():
        assert segment_lengths(tiny_qwen3_config(tied=False, vocab=301, taps=taps).vision_config) == lengths
