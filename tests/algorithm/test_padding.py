"""Masks and padded rows."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.padding import length_mask, pad_rows


def test_padding() -> None:
    assert length_mask([2, 0, 3]).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert length_mask([1], width=3).tolist() == [[1, 0, 0]]
    padded = pad_rows([[1, 2], [], [3]], dtype=torch.int64, width=3, fill=-1)
    assert padded.dtype == torch.int64 and padded.tolist() == [[1, 2, -1], [-1, -1, -1], [3, -1, -1]]
    assert pad_rows([], dtype=torch.float32).shape == (0, 0)
    assert pad_rows([[5.0], []], dtype=torch.float32).tolist() == [[5.0], [0.0]]
    for make in (lambda: length_mask([4], width=3), lambda: pad_rows([[0.0] * 4], dtype=torch.float32, width=3)):
        with pytest.raises(ValueError, match="4 entries, more than the width of 3"):
            make()
