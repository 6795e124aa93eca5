"""Scaled advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.shaping import MIN_RANGE, dependency_means, shape_advantages, trajectory_scale
from megatron_vppo.config.choices import NegativeAdvantages


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


@pytest.mark.parametrize("negative", ["unscaled", "mirrored"])
def test_the_sign_alone_decides(negative: NegativeAdvantages) -> None:
    """Advantages of less than one in size, on either side of zero."""
    shaped_B = shape_advantages(torch.tensor([0.5, -0.5]), torch.tensor([1.5, 1.5]), negative=negative)
    assert shaped_B.tolist() == pytest.approx([0.75, {"unscaled": -0.5, "mirrored": -0.25}[negative]])


def test_dependency_means_of_short_responses() -> None:
    mean_B = dependency_means(torch.tensor([[3.0, 7.0], [3.0, 7.0], [3.0, 7.0]]), length_mask([0, 1, 2]))
    assert mean_B.tolist() == [0.0, 3.0, 5.0]


def test_means_that_span_the_bound_keep_scale_one() -> None:
    counted_B = torch.ones(2, dtype=torch.bool)
    at = trajectory_scale(torch.tensor([0.0, MIN_RANGE]), counted_B, scale_min=0.9)
    above = trajectory_scale(torch.tensor([0.0, 1.5 * MIN_RANGE]), counted_B, scale_min=0.9)
    assert at.scale_B.tolist() == [1.0, 1.0]
    assert above.scale_B.tolist() == pytest.approx([0.9, 1.1], abs=1e-6)
