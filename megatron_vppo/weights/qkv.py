"""The kinds of the attention's input projections: queries, keys and values in one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vppo.weights.kinds import Shape, Unpadded, share_of


class RowsByHead(Unpadded):
    """The kinds whose rows are ordered by (key-value) head, and split over ranks between heads."""

    partition_dim = 0
    partition_stride = 1
    unpadded_rows = None

    @property
    def row_blocks(self) -> int:
        raise NotImplementedError

    @property
    def stacks_rows(self) -> bool:
        return self.row_blocks == 1


@dataclass(frozen=True)
class GroupedQKV(RowsByHead):
    """Three projections -> one, ordered by key-value head: the queries of its group, its key, its value.

    Hugging Face    q0 q1 q2 q3      k0 k1      v0 v1           4 heads, 2 key-value heads
    unsplit         q0 q1 k0 v0 q2 q3 k1 v1
    """

    heads: int
    kv_heads: int
    head_dim: int
    tail: Shape

    @property
    def row_blocks(self) -> int:
        return self.kv_heads

    def hf_shapes(self) -> tuple[Shape, ...]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (query, *self.tail), (key, *self.tail), (key, *self.tail)

    def local_shape(self, size: int) -> Shape:
        return ((self.heads + 2 * self.kv_heads) * self.head_dim // size, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = share_of(self.kv_heads, rank=rank, size=size, unit="key-value heads")
        blocks = []
        for tensor, heads_per_group in zip(hf, self._heads_per_group(), strict=True):
            rows = heads_per_group * self.head_dim
            blocks.append(tensor[low * rows : high * rows].reshape(high - low, rows, *self.tail))
        return torch.cat(blocks, dim=1).reshape(-1, *self.tail)

    def views(self, shards: Tensor) -> Iterator[Tensor]:
        rows = [heads * self.head_dim for heads in self._heads_per_group()]
        yield from shards.view(self.kv_heads, sum(rows), *self.tail).split(rows, dim=1)

    def _heads_per_group(self) -> tuple[int, int, int]:
        return self.heads // self.kv_heads, 1, 1


@dataclass(frozen=True)
class FusedQKV(RowsByHead):
    """One tensor of all queries, all keys, all values -> one ordered by head: its query, its key, its value.

    Hugging Face    q0 q1 k0 k1 v0 v1           2 heads
    unsplit         q0 k0 v0 q1 k1 v1
    """

    heads: int
    head_dim: int
    tail: Shape

    @property
    def row_blocks(self) -> int:
        return self.heads

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((3 * self.heads * self.head_dim, *self.tail),)

    def local_shape(self, size: int) -> Shape:
        return (3 * self.heads * self.head_dim // size, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = share_of(self.heads, rank=rank, size=size, unit="attention heads")
        starts = [number * self.heads * self.head_dim for number in range(3)]  # of queries, keys, values
        blocks = [
            hf[0][start + low * self.head_dim : start + high * self.head_dim].reshape(
                high - low, self.head_dim, *self.tail
            )
            for start in starts
        ]
        return torch.cat(blocks, dim=1).reshape(-1, *self.tail)

    def views(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards.view(self.heads, 3, self.head_dim, *self.tail).transpose(0, 1)
