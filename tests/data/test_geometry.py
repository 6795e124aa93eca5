"""The pixel budget: sizes that a further resize leaves alone, and those that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from megatron_vppo.data.geometry import ImageGeometry, check_budget, least_tokens


def test_budget_sizes_are_fixed_points_or_refused() -> None:
    geometry = ImageGeometry.from_processor(
        Qwen2VLImageProcessor(), min_pixels=200704, max_pixels=1003520, mode="smart"
    )
    assert geometry.budget_size(448, 448) == (448, 448)
    assert geometry.budget_size(1200, 1200) == (980, 980)  # 1001.76 square root of the budget, rounded down to 28
    assert geometry.budget_size(100, 100) == (448, 448)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        width, height = (int(v) for v in np.exp(rng.uniform(0, 9, 2)))
        try:
            size = geometry.budget_size(width, height)
        except ValueError as error:
            refused += 1
            assert "aspect ratio is over 200" in str(error)
            assert max(width, height) / min(width, height) > 100
            continue
        assert geometry.budget_size(*size) == size
        assert size[0] % 28 == 0 and size[1] % 28 == 0
        assert max(size) / min(size) <= 200 and size[0] * size[1] <= 1003520
    assert 400 < refused < 700  # (1 - ln 200 / 9)^2 of 3000 are over 200 from the start: 507


def test_budgets_without_a_stable_size_are_refused() -> None:
    processor = Qwen2VLImageProcessor()
    narrow = ImageGeometry.from_processor(processor, min_pixels=8 * 784 - 1, max_pixels=8 * 784, mode="smart")
    assert narrow.budget_size(112, 56) == (112, 56)
    with pytest.raises(ValueError, match=r"no stable size.*widen"):
        narrow.budget_size(84, 84)  # 9 tokens are too many, and 4 too few
    with pytest.raises(ValueError, match="need min <= max"):
        ImageGeometry.from_processor(processor, min_pixels=8000, max_pixels=4000, mode="smart")


def test_budgets_between_two_multiples_of_a_token_are_refused() -> None:
    """By transformers' own resize: no size of an image comes under such a budget."""
    between = {"min_pixels": 785, "max_pixels": 1567}
    sizes = [smart_resize(height, width, factor=28, **between) for height in (28, 56, 84, 300) for width in (28, 91)]
    assert not any(785 <= height * width <= 1567 for height, width in sizes)
    with pytest.raises(ValueError, match=r"no multiple of 784 .* set data\.max_pixels to at least 1568"):
        check_budget(**between, mode="smart", pixels_per_token=784)
    check_budget(min_pixels=785, max_pixels=1568, mode="smart", pixels_per_token=784)
    check_budget(min_pixels=784, max_pixels=784, mode="smart", pixels_per_token=784)
    check_budget(**between, mode="easyr1", pixels_per_token=784)  # the processor's own limits follow
    assert [least_tokens(pixels, pixels_per_token=784) for pixels in (1, 784, 785, 200704)] == [1, 1, 2, 256]
