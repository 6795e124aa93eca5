"""The places of weights and of optimizer state in a checkpoint: which rank writes which piece, and reads which.

The state of a parameter is stored under the parameter's own key, in its own global shape: `optimizer.state.exp_avg.` +
key, and so on, as Megatron's ordinary optimizers do. Padding between parameters in Megatron's buffers, and the cuts of
these buffers over ranks, are nowhere in the file. So a run under another layout finds its part by the shapes of its own
parameters.

With the distributed optimizer a rank holds a range of a parameter's values. In a matrix that range is at most three
rectangles, which are pieces of the stored tensor like any others:

    columns   0 1 2 3 4
    row 0     . . . a a      the end of a row
    row 1     b b b b b      whole rows
    row 2     b b b b b
    row 3     c c . . .      the beginning of a row

Each rank writes and reads its own rectangles, straight from and into the optimizer's memory. Nothing is gathered. Rows
and columns of zeros that pad a parameter (weights/padding.py) are cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_vppo.parallel.balancing import assign_to_ranks
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.optimizer_state import HeldState, held_states
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.weights.padding import sharded_blocks

PREFIX = "optimizer.state."
"""The beginning of the keys of optimizer state: PREFIX + name of the quantity + "." + key of the parameter."""


def share_weights(models: Sequence[Mapping[str, Any]], layout: Layout) -> None:
    """Divides the writing of weights among the ranks that hold the same ones; by Megatron the first of them has it all.

    Args:
        models: the sharded states of this rank's stages; their replica numbers are changed.
    """
    items = [
        item for model in models for item in model.values() if isinstance(item, ShardedTensor | ShardedTensorFactory)
    ]
    written = _written_here([item.data.numel() for item in items], layout)
    for number, item in enumerate(items):
        first, second, _ = item.replica_id
        item.replica_id = (first, second, int(number not in written))


def optimizer_shards(
    trainable: Trainable, models: Sequence[Mapping[str, Any]], layout: Layout
) -> dict[str, ShardedTensor]:
    """Returns the pieces of optimizer state that this rank holds, by numbers that mean nothing.

    With the distributed optimizer it is the only one of its data- and context-parallel ranks that holds them. Without,
    all of these hold the same, and one of them is to write each piece.

    Args:
        models: the sharded states of this rank's stages.
    """
    places = {
        parameter: model[name]
        for stage, model in zip(trainable.stages, models, strict=True)
        for name, parameter in stage.named_parameters()
    }
    held = held_states(trainable)
    written = set(range(len(held)))
    if not trainable.settings.use_distributed_optimizer:
        written = _written_here([state.parameter.numel() for state in held], layout)
    shards = [
        shard
        for number, state in enumerate(held)
        for shard in _shards_of(state, places[state.parameter], is_written=number in written)
    ]
    return {str(number): shard for number, shard in enumerate(shards)}


def _written_here(sizes: Sequence[int], layout: Layout) -> set[int]:
    """Divides items among the ranks that hold the same; returns the numbers of those that this one is to write."""
    replicas = layout.groups.dp_cp
    return set(assign_to_ranks(sizes, num_ranks=replicas.size())[replicas.rank()])


def _shards_of(
    held: HeldState, place: ShardedTensor | ShardedTensorFactory, *, is_written: bool
) -> Iterator[ShardedTensor]:
    blocks = sharded_blocks(place)
    rows_of_block = held.parameter.shape[0] // len(blocks)
    columns = math.prod(held.parameter.shape[1:])
    for number, block in enumerate(blocks):
        first = number * rows_of_block * columns  # value of the block, among those of the parameter
        stored_rows, stored_columns = block.local_shape[0], math.prod(block.local_shape[1:])
        low, high = max(held.start, first), min(held.stop, first + stored_rows * columns)
        for row, column, rows, width in _rectangles(low - first, high - first, columns):
            stored = min(width, stored_columns - column)
            if stored <= 0:
                continue
            begin = first + row * columns + column - held.start
            for name, flat in held.flat.items():
                values = flat[begin : begin + rows * width].view(rows, width)[:, :stored]
                yield _shard(block, name, values, row, column, is_written=is_written)


def _rectangles(low: int, high: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts the values low to high of a matrix, counted row by row, into (row, column, rows, width) rectangles."""
    while low < high:
        row, column = divmod(low, columns)
        rows, width = (high - low) // columns, columns
        if column or not rows:
            rows, width = 1, min(high - low, columns - column)
        yield row, column, rows, width
        low += rows * width


def _shard(
    block: ShardedTensor, name: str, values: Tensor, row: int, column: int, *, is_written: bool
) -> ShardedTensor:
    """Makes one piece of [rows, columns]. Dimensions that count layers are in its shape, as pieces of unequal size need
    it.
    """
    dims = len(block.local_shape)
    assert dims <= 2, f"{block.key} has {dims} dimensions"
    stacked = block.prepend_axis_num
    shape = (*(1,) * stacked, *values.shape[:dims])
    inner = zip(block.global_offset[stacked:], (row, column)[:dims], strict=True)
    offset = (*block.global_offset[:stacked], *(start + more for start, more in inner))
    return ShardedTensor(
        key=f"{PREFIX}{name}.{block.key}",
        data=values.view(shape),
        dtype=values.dtype,
        local_shape=shape,
        global_shape=tuple(block.global_shape),
        global_offset=offset,
        axis_fragmentations=None,  # pieces of unequal size
        replica_id=(*block.replica_id[:2], int(not is_written)),
        allow_shape_mismatch=block.allow_shape_mismatch,
    )
