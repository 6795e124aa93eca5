"""Values of bytes, by hand. That they are the image processor's is tested with images (tests/data/test_images.py)."""

from __future__ import annotations

import torch

from megatron_vppo.algorithm.patches import PatchValues

VALUES = PatchValues(torch.stack([torch.arange(256.0), 1000 - torch.arange(256.0)]), frames=2)
"""Two channels: the byte itself, and 1000 less it."""


def test_each_frame_holds_the_values_of_each_channel() -> None:
    bytes_PD = torch.tensor([[0, 1, 254, 255], [7, 7, 7, 7]], dtype=torch.uint8)  # two pixels of each channel
    values_PD = VALUES(bytes_PD)
    assert values_PD.dtype == torch.float32
    assert values_PD.tolist() == [[0, 1, 0, 1, 746, 745, 746, 745], [7, 7, 7, 7, 993, 993, 993, 993]]


def test_hidden_patches_are_black() -> None:
    bytes_PD = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.uint8)
    values_PD = VALUES(bytes_PD, torch.tensor([True, False]))
    assert values_PD.tolist() == [[0, 0, 0, 0, 1000, 1000, 1000, 1000], [5, 6, 5, 6, 993, 992, 993, 992]]
    assert bytes_PD[0].tolist() == [1, 2, 3, 4], "the image itself stays"
