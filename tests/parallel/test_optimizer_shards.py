"""The pieces of a matrix, and the sharing of what several ranks hold alike."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch.nn import Parameter

from megatron_vppo.parallel.optimizer_shards import _shards_of, share_weights
from megatron_vppo.parallel.optimizer_state import MAIN, HeldState
from megatron_vppo.weights.padding import without_padding

NAMES = ("exp_avg", "exp_avg_sq", MAIN)


def held(shape: tuple[int, ...], start: int, stop: int) -> HeldState:
    """Values that say what they are: their place in the parameter, plus a thousand for the second quantity, ..."""
    flat = torch.arange(float(math.prod(shape)))[start:stop]
    return HeldState(Parameter(torch.zeros(shape)), start, {name: 1000 * n + flat for n, name in enumerate(NAMES)})


@pytest.mark.parametrize("shape", [(3, 5), (1, 7), (6, 1), (9,)])
def test_pieces_of_every_range_lie_where_the_values_do(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    place = ShardedTensor.from_rank_offsets("w", torch.zeros(shape), (0, 1, 3), replica_id=(0, 0, 5))
    for start in range(size):
        for stop in range(start + 1, size + 1):
            stored = {name: torch.full((3 * shape[0], *shape[1:]), -1.0) for name in NAMES}
            pieces = list(_shards_of(held(shape, start, stop), place, is_written=True))
            for piece in pieces:
                assert piece.global_shape == (3 * shape[0], *shape[1:]) and piece.replica_id == (0, 0, 0)
                name = piece.key.removeprefix("optimizer.state.").removesuffix(".w")
                assert (stored[name][piece.global_slice()] == -1).all(), "two pieces overlap"
                stored[name][piece.global_slice()] = piece.data
            expected = torch.full((3 * size,), -1.0)
            expected[size + start : size + stop] = torch.arange(float(start), float(stop))
            for number, name in enumerate(NAMES):
                shifted = torch.where(expected >= 0, expected + 1000 * number, expected)
                assert torch.equal(stored[name].flatten(), shifted), f"{start} to {stop}"
            assert len(pieces) <= 3 * len(NAMES)


@pytest.mark.parametrize(("dim", "halves"), [(0, 1), (1, 1), (0, 2)])
def test_padding_is_in_no_piece(dim: int, halves: int) -> None:
    """The last two of 5 rows or columns are zeros; the rank is the second of three that hold the stored tensor."""
    shape = (halves * 5, 4) if dim == 0 else (4, 5)
    place = without_padding(_of_halves(shape, halves), dim=dim, padding=2)
    real = torch.arange(float(math.prod(shape))).view(shape)
    real = torch.cat([block.narrow(dim, 0, 3) for block in real.chunk(halves)])
    size = math.prod(shape)
    for start in range(size):
        for stop in range(start + 1, size + 1):
            found = torch.full((3 * real.shape[0], real.shape[1]) if dim == 0 else (4, 9), -1.0)
            for piece in _shards_of(held(shape, start, stop), place, is_written=True):
                if piece.key.startswith("optimizer.state.exp_avg."):
                    assert piece.global_shape == found.shape
                    assert (found[piece.global_slice()] == -1).all(), "two pieces overlap"
                    found[piece.global_slice()] = piece.data
            expected = torch.where((real >= start) & (real < stop), real, -1.0)
            own = torch.cat(found.chunk(3 * halves, dim)[1::3], dim)
            assert torch.equal(own, expected) and int((found >= 0).sum()) == int((expected >= 0).sum())


def _of_halves(shape: tuple[int, ...], halves: int) -> ShardedTensor | ShardedTensorFactory:
    """The second of three ranks' parameter: as Megatron stores a plain and a gated one."""
    cut = (0, 1, 3) if shape[0] % 5 == 0 else (1, 1, 3)
    whole = ShardedTensor.from_rank_offsets("w", torch.zeros(shape), cut, replica_id=(0, 0, 0))
    return whole if halves == 1 else apply_swiglu_sharded_factory(whole, ())


def test_pieces_are_the_optimizer_s_own_memory() -> None:
    state = held((3, 5), 2, 13)
    place = ShardedTensor.from_rank_offsets("w", torch.zeros(3, 5), (0, 2, 7), prepend_axis_num=1, replica_id=(0, 0, 0))
    for piece in _shards_of(state, place, is_written=False):
        assert piece.global_shape == (7, 3, 5) and piece.global_offset[0] == 2
        piece.data.zero_()
    assert all(not values.any() for values in state.flat.values())


def test_one_of_those_that_hold_the_same_writes_it() -> None:
    sizes = [(4, 10), (3,), (6, 7), (50,), (1, 1)]
    writers: list[list[int]] = []
    for rank in range(3):
        group = SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank)
        layout: Any = SimpleNamespace(groups=SimpleNamespace(dp_cp=group))
        model = {
            str(number): ShardedTensor.from_rank_offsets("w", torch.zeros(size), replica_id=(0, 2, rank))
            for number, size in enumerate(sizes)
        }
        share_weights([model], layout)
        assert all(item.replica_id[:2] == (0, 2) for item in model.values()), "other replicas stay what they are"
        writers.append([number for number, item in enumerate(model.values()) if item.replica_id[2] == 0])
    assert sorted(number for written in writers for number in written) == list(range(len(sizes)))
    assert all(writers)
