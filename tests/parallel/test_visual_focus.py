"""The cosines of hidden states, by hand; against transformers and in every layout: tests/proofs/test_layouts.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.parallel.visual_focus import ReadTokens, visual_focus, visual_tokens

# Twelve packed tokens: prompt 0 with two image tokens, prompt 1 without, then the two responses to prompt 0, which
# share it, and one to prompt 1. Another rank holds the tokens 4 to 7.
VIEWS = [
    ReadTokens(prompt=0, image_index=np.array([1, 2]), own_index=np.array([5, 8]), row=2),
    ReadTokens(prompt=1, image_index=np.array([], dtype=np.int64), own_index=np.array([9]), row=0),
    ReadTokens(prompt=0, image_index=np.array([1, 2]), own_index=np.array([10, 11]), row=4),
]
INDEX_IN_C = np.array([0, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6, 7])


def test_what_a_rank_holds() -> None:
    tokens = visual_tokens(VIEWS, INDEX_IN_C)
    assert [index.tolist() for index in tokens.image_index] == [[1, 2]]
    assert tokens.own_index_N.tolist() == [4, 6, 7] and tokens.prompt_N.tolist() == [0, 0, 0]
    assert [index.tolist() for index in tokens.at] == [[2, 4, 4], [1, 0, 1]]


@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cosines_by_hand(dtype: torch.dtype, chunk_tokens: int) -> None:
    """The image's tokens are (4, 0) and (2, 6): their mean is (3, 3), whatever the lengths of the others."""
    hidden_Ch = torch.tensor([[9, 9], [4, 0], [2, 6], [9, 9], [5, 5], [9, 9], [0, -2], [-7, 7]], dtype=dtype)
    with single_rank() as layout:
        found_N = visual_focus(
            hidden_Ch, visual_tokens(VIEWS, INDEX_IN_C), group=layout.groups.cp, chunk_tokens=chunk_tokens
        )
    assert found_N.tolist() == pytest.approx([1.0, -(0.5**0.5), 0.0], abs=1e-7)
    assert found_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_without_images() -> None:
    tokens = visual_tokens(VIEWS[1:2], INDEX_IN_C)
    assert tokens.image_index == () and tokens.own_index_N.tolist() == []
    with single_rank() as layout:
        assert visual_focus(torch.ones(8, 2), tokens, group=layout.groups.cp, chunk_tokens=4).tolist() == []
