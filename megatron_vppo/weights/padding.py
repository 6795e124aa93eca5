"""The places of padded parameters in a checkpoint, which holds them without their padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_vppo.weights.padded_widths import pad_end


def without_padding(item: ShardedTensor | ShardedTensorFactory, *, dim: int, padding: int) -> ShardedTensorFactory:
    """Returns the place of a parameter whose blocks of rows each end in `padding` rows or columns of zeros.

    Written are views without the zeros; what is loaded gets them again. Shape and offset in the checkpoint are those of
    a model that never was padded, so nothing there follows from the tensor-parallel size.

    Args:
        item: the place of the padded parameter, as Megatron makes it.
        dim: the dimension of the parameter that is padded.
    """

    def build(key: str, data: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        assert key == item.key and flattened_range is None
        blocks = sharded_blocks(replace(item, data=data, replica_id=replica_id))
        return [_narrowed(block, dim=dim, padding=padding) for block in blocks]

    @torch.no_grad()
    def merge(loaded: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad_end(block, padding, dim=dim) for block in loaded])

    return ShardedTensorFactory(item.key, item.data, build, merge, item.replica_id)


def sharded_blocks(item: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Returns the blocks of rows in which a parameter is stored: two for a gated projection, else one."""
    if not isinstance(item, ShardedTensorFactory):
        return [item]
    built = item.build()
    assert isinstance(built, list), f"{item.key} is not stored as blocks of rows"
    return built


def _narrowed(block: ShardedTensor, *, dim: int, padding: int) -> ShardedTensor:
    """Leaves out the end of a block, and of the blocks before it in the stored tensor, which are as long."""
    held = block.local_shape[dim]
    real, at = held - padding, block.prepend_axis_num + dim

    def cut(lengths: tuple[int, ...], where: int) -> tuple[int, ...]:
        return (*lengths[:where], lengths[where] // held * real, *lengths[where + 1 :])

    return replace(
        block,
        data=block.data.narrow(dim, 0, real),
        local_shape=cut(block.local_shape, dim),
        global_shape=cut(block.global_shape, at),
        global_offset=cut(block.global_offset, at),
    )
