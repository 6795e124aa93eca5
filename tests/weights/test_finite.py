"""Weights that are no numbers are refused by name, wherever they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vppo.weights.finite import cast_weights, check_finite, non_finite

FILE = Path("a/b.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("value", "kind"),
    [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity")],
)
def test_one_value_among_many(dtype: torch.dtype, value: str, kind: str) -> None:
    values = torch.full((70, 33), -2.5, dtype=dtype)
    check_finite(values, name="w", where=FILE)
    for place in (0, 1000, values.numel() - 1):
        spoilt = values.clone()
        spoilt.view(-1)[place] = float(value)
        assert non_finite(spoilt) == kind
    values[69, 32] = float(value)
    with pytest.raises(ValueError, match=f"^w in a/b.safetensors holds {kind};"):
        check_finite(values, name="w", where=FILE)


def test_the_largest_numbers_and_nothing_at_all_are_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        check_finite(torch.tensor([info.max, info.min], dtype=dtype), name="w", where=FILE)
    check_finite(torch.empty(0, 5), name="w", where=FILE)
    assert non_finite(torch.tensor([float("inf"), float("nan"), -float("inf")])) == "NaN"


def test_a_cast_beyond_float16_is_refused() -> None:
    """65504 is its largest value; 65519 still rounds to it, 65520 to infinity."""
    fits = torch.tensor([65519.0, -65504.0])
    assert cast_weights(fits, torch.float16, name="w").tolist() == [65504.0, -65504.0]
    for value in (65520.0, -7e4):
        with pytest.raises(ValueError, match="w has values beyond the range of float16; convert to bfloat16"):
            cast_weights(torch.tensor([1.0, value]), torch.float16, name="w")
    assert cast_weights(torch.tensor([7e4]), torch.bfloat16, name="w").isfinite().all()
    assert cast_weights(torch.empty(0), torch.float16, name="w").numel() == 0
