"""The image tokens of a rank, by hand: the example of stage_input.py."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.models.layers.context_parallel import tokens_of_rank
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.stage_input import image_tokens_of_rank

PACKED = PackedBatch(
    token_ids_K=torch.tensor([5, 9, 9, 9, 9, 6, 7, 8]),
    positions_3K=torch.arange(8).expand(3, 8),
    packing=Packing((8,)),
    image_token_index_I=torch.tensor([1, 2, 3, 4]),
    image_feature_index_I=torch.tensor([3, 4, 5, 6]),
)


@pytest.mark.parametrize(
    ("context_rank", "index", "feature"), [(0, [1], [3]), (1, [0, 1, 2], [4, 5, 6])], ids=["rank 0", "rank 1"]
)
def test_image_tokens_of_context_parallel_ranks(context_rank: int, index: list[int], feature: list[int]) -> None:
    own_C = tokens_of_rank(PACKED.packing, rank=context_rank, size=2)
    tokens = image_tokens_of_rank(PACKED, own_C, sequence_rank=0, sequence_ranks=1)
    assert tokens.index_J.tolist() == index and tokens.feature_J.tolist() == feature
    assert tokens.held == slice(0, len(index)) and tokens.index_W.tolist() == index


@pytest.mark.parametrize(
    ("rank", "held", "index"), [(0, slice(0, 2), [0, 1]), (1, slice(2, 3), [0])], ids=["rank 0", "rank 1"]
)
def test_image_tokens_that_sequence_parallel_ranks_hold(rank: int, held: slice, index: list[int]) -> None:
    """Tensor-parallel ranks of context rank 1, whose tokens are i i i b."""
    own_C = tokens_of_rank(PACKED.packing, rank=1, size=2)
    tokens = image_tokens_of_rank(PACKED, own_C, sequence_rank=rank, sequence_ranks=2)
    assert tokens.held == held and tokens.index_W.tolist() == index
    assert tokens.index_J.tolist() == [0, 1, 2], "each rank puts in the features of all"
