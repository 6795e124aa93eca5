"""The properties of each kind, against what its `shard` does for every number of ranks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from megatron_vppo.weights.kinds import (
    Gated,
    Kind,
    Replicated,
    Split,
    Vocabulary,
    merge,
    stored_shape,
    whole,
)
from megatron_vppo.weights.padded_widths import padded_share
from megatron_vppo.weights.qkv import FusedQKV, GroupedQKV

KINDS: dict[str, Kind] = {
    "whole": whole(6, 4),
    "reshaped": Replicated(hf_shape=(6, 2, 2), shape=(6, 4)),
    "columns of a weight": Split((6, 4), 1),
    "rows of a weight": Split((6, 4), 0),
    "rows of a bias": Split((6,), 0),
    "gated": Gated(6, (2,)),
    "grouped QKV": GroupedQKV(heads=12, kv_heads=6, head_dim=2, tail=(3,)),
    "one key-value head": GroupedQKV(heads=3, kv_heads=1, head_dim=2, tail=(3,)),
    "fused QKV": FusedQKV(heads=4, head_dim=2, tail=(3,)),
    "bias of one fused head": FusedQKV(heads=1, head_dim=4, tail=()),
    "vocabulary": Vocabulary(6, 3),
}
PADDED: dict[str, Split | Gated] = {
    "columns of a weight": Split((3, 36), 1, padded=True),
    "rows of a weight": Split((36, 3), 0, padded=True),
    "rows of a bias": Split((36,), 0, padded=True),
    "gated": Gated(36, (2,), padded=True),
    "gated bias": Gated(36, (), padded=True),
}
EVERY_SIZE = range(1, 15)


def tensors_of(kind: Kind) -> list[Tensor]:
    """Hugging Face tensors in which no value occurs twice, and none is the zero of padding."""
    numbers = itertools.count(1)
    return [
        torch.tensor([float(next(numbers)) for _ in range(torch.Size(shape).numel())]).reshape(shape)
        for shape in kind.hf_shapes()
    ]


def shards_of(kind: Kind, size: int) -> list[Tensor] | None:
    """The parameter of every rank; None where the kind refuses this number of ranks."""
    try:
        return [kind.shard(tensors_of(kind), rank=rank, size=size) for rank in range(size)]
    except ValueError:
        return None


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def test_rows_are_stacked_where_the_kind_says_so(kind: Kind) -> None:
    parameter = kind.shard(tensors_of(kind), rank=0, size=1)
    rows = [row for tensor in tensors_of(kind) for row in tensor]
    stacked = len(rows) == len(parameter) and all(map(torch.equal, rows, parameter))
    assert kind.stacks_rows == stacked


@pytest.mark.parametrize("size", EVERY_SIZE)
def test_shards_are_the_blocks_of_rows_that_the_kind_says(kind: Kind, size: int) -> None:
    shards = shards_of(kind, size)
    together = None if shards is None else torch.cat(shards)
    parameter = kind.shard(tensors_of(kind), rank=0, size=1)
    are_blocks = together is not None and torch.equal(together, parameter)
    assert are_blocks == (kind.row_blocks % size == 0)


@pytest.mark.parametrize("size", EVERY_SIZE)
def test_shards_are_cut_as_megatron_cuts_a_master_weight(kind: Kind, size: int) -> None:
    """It makes size x stride blocks along the dimension, and gives each rank every size-th of them."""
    shards = shards_of(kind, size)
    unsplit = kind.shard(tensors_of(kind), rank=0, size=1)
    if shards is None or (kind.unpadded_rows or 0) % size:
        return
    if kind.partition_dim is None:
        expected = [unsplit] * size
    else:
        width = shards[0].shape[kind.partition_dim] // kind.partition_stride
        blocks = unsplit.split(width, kind.partition_dim)
        expected = [torch.cat(blocks[rank::size], kind.partition_dim) for rank in range(size)]
    assert all(torch.equal(a, b) for a, b in zip(shards, expected, strict=True))


def test_only_what_may_be_padded_ever_is(kind: Kind) -> None:
    rows = len(kind.shard(tensors_of(kind), rank=0, size=1))
    padded = any(
        bool((shard == 0).any()) for size in EVERY_SIZE if (shards := shards_of(kind, size)) for shard in shards
    )
    assert kind.unpadded_rows == (rows if padded else None)


@pytest.mark.parametrize("size", EVERY_SIZE)
def test_shards_have_the_shape_that_the_kind_says_and_merge_again(kind: Kind, size: int) -> None:
    shards = shards_of(kind, size)
    if shards is None:
        return
    assert {tuple(shard.shape) for shard in shards} == {kind.local_shape(size)}
    merged = list(merge(kind, torch.stack(shards)))
    assert all(torch.equal(a, b) for a, b in zip(merged, tensors_of(kind), strict=True))


def test_some_sizes_are_refused() -> None:
    refused = {name: [size for size in EVERY_SIZE if shards_of(kind, size) is None] for name, kind in KINDS.items()}
    assert refused["whole"] == refused["vocabulary"] == []
    assert refused["grouped QKV"] == [size for size in EVERY_SIZE if size not in (1, 2, 3, 6)]


# --- Padded widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 9, 12])
@pytest.mark.parametrize("name", PADDED)
def test_padded_shares_are_the_others_with_zeros_behind_each_block(name: str, size: int) -> None:
    kind = PADDED[name]
    plain = dataclasses.replace(kind, padded=False)
    share, blocks, dim = 36 // size, kind.partition_stride, kind.partition_dim
    wanted = next(width for width in itertools.count(share) if width % 8 == 0)
    assert kind.padding(size) == wanted - share and plain.padding(size) == 0
    shards = [kind.shard(tensors_of(kind), rank=rank, size=size) for rank in range(size)]
    for rank, shard in enumerate(shards):
        assert tuple(shard.shape) == kind.local_shape(size) and shard.shape[dim] == blocks * wanted
        held = [block.split([share, wanted - share], dim) for block in shard.chunk(blocks, dim)]
        unpadded = plain.shard(tensors_of(kind), rank=rank, size=size)
        assert torch.equal(torch.cat([real for real, _ in held], dim), unpadded)
        assert not any(zeros.any() for _, zeros in held)
    for found, tensor in zip(merge(kind, torch.stack(shards)), tensors_of(kind), strict=True):
        assert torch.equal(found, tensor)


def test_what_is_stored_has_no_padding(kind: Kind) -> None:
    assert stored_shape(kind) == tuple(kind.shard(tensors_of(kind), rank=0, size=1).shape)
    for padded in PADDED.values():
        assert stored_shape(padded) == dataclasses.replace(padded, padded=False).local_shape(1)


@pytest.mark.parametrize("padded", PADDED.values(), ids=PADDED)
def test_padded_shards_below_each_other_are_no_parameter(padded: Split | Gated) -> None:
    assert padded.row_blocks == 1


@pytest.mark.parametrize(("width", "size", "share"), [(3420, 1, 3424), (3420, 4, 856), (4304, 2, 2152), (4304, 8, 544)])
def test_shares_of_released_models(width: int, size: int, share: int) -> None:
    assert padded_share(width, size) == share
