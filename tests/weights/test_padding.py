"""Padded parameters in a checkpoint, against the places that Megatron gives the same parameters without padding."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor

from megatron_vppo.weights.padding import sharded_blocks, without_padding

RANK, RANKS, LAYER, LAYERS = 1, 3, 2, 7


def place(tensor: Tensor, *, dim: int, gated: bool) -> ShardedTensor | ShardedTensorFactory:
    """The place that Megatron makes for the second of three ranks, in the third of seven layers."""
    stacked = (0, LAYER, LAYERS)
    item = ShardedTensor.from_rank_offsets(
        "w", tensor, stacked, (1 + dim, RANK, RANKS), prepend_axis_num=1, replica_id=(0, 0, 4)
    )
    return apply_swiglu_sharded_factory(item, (stacked,)) if gated else item


@pytest.mark.parametrize(("dim", "gated"), [(0, False), (1, False), (0, True)])
def test_a_padded_parameter_lies_where_an_unpadded_one_does(dim: int, gated: bool) -> None:
    blocks = [torch.rand(4, 6) for _ in range(2 if gated else 1)]
    zeros = torch.zeros(2, 6) if dim == 0 else torch.zeros(4, 2)
    padded = torch.cat([torch.cat([block, zeros], dim) for block in blocks])
    plain = place(torch.cat(blocks), dim=dim, gated=gated)
    item = without_padding(place(padded, dim=dim, gated=gated), dim=dim, padding=2)

    found, expected = sharded_blocks(item), sharded_blocks(plain)
    assert len(found) == len(expected) == len(blocks)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.data, theirs.data)
        assert ours.without_data() == theirs.without_data()
        assert ours.data.untyped_storage().data_ptr() == padded.untyped_storage().data_ptr(), "a view"
    assert torch.equal(item.merge_fn([block.data.clone() for block in found]), padded)


def test_the_rank_that_writes_is_the_one_that_is_set() -> None:
    item = without_padding(place(torch.zeros(6, 6), dim=0, gated=False), dim=0, padding=2)
    assert item.replica_id == (0, 0, 4)
    item.replica_id = (0, 1, 0)
    assert [block.replica_id for block in sharded_blocks(item)] == [(0, 1, 0)]
