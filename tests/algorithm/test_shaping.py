"""Scaled advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.shaping import shape_advantages


def test_negative_advantages() -> None:
    advantage_B = torch.tensor([2.0, 2.0, -2.0, -2.0, -2.0])
    scale_B = torch.tensor([0.9, 1.5, 0.9, 1.5, 2.5])
    expected = {
        "same": [1.8, 3.0, -1.8, -3.0, -5.0],
        "unscaled": [1.8, 3.0, -2.0, -2.0, -2.0],
        # 2 - alpha; at alpha 2.5 it would turn the sign, so it stops at zero.
        "mirrored": [1.8, 3.0, -2.2, -1.0, 0.0],
    }
    for negative, values in expected.items():
        assert shape_advantages(advantage_B, scale_B, negative=negative).tolist() == pytest.approx(values)
    with pytest.raises(ValueError, match="flipped"):
        shape_advantages(advantage_B, scale_B, negative="flipped")
