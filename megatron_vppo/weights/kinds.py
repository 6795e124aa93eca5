"""The kinds of correspondence between Hugging Face tensors and the parameters of a Megatron model.

Kinds are pure: `shard` cuts what one tensor-parallel rank holds, and `merge` puts the shards of all ranks together
again, bit for bit.

`shard` only slices its inputs along one dimension (`x[a:b]`, `x[:, a:b]`, `x[:]`), so it also takes tensors that still
lie in a safetensors file (`hf_folder.FileTensor`), and reads no more of them than this rank needs.

A new kind is one class here, since no other file asks which kind it has. The "unsplit" parameter is the one that a rank
holds with tensor-parallel size 1. A gated projection of 4 rows on 2 ranks, for example:

    Hugging Face        gate: g0 g1 g2 g3      up: u0 u1 u2 u3
    unsplit             g0 g1 g2 g3 u0 u1 u2 u3
    shard, rank 0       g0 g1 u0 u1
    shard, rank 1       g2 g3 u2 u3
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Kind(Protocol):
    """The correspondence between the tensors of an `Entry` and its parameter on each tensor-parallel rank."""

    @property
    def partition_dim(self) -> int | None:
        """The dimension of the parameter that is split over ranks; None if every rank holds all of it."""

    @property
    def partition_stride(self) -> int:
        """Megatron's `stride`: the number of interleaved blocks that the split dimension consists of."""

    @property
    def stacks_rows(self) -> bool:
        """True if the unsplit parameter is the Hugging Face tensors one below the other, with their rows unchanged.

        Such a parameter can be read and written a few rows at a time.
        """

    @property
    def row_blocks(self) -> int:
        """The largest `size` for which the shards of ranks 0, 1, ..., one below the other, are the unsplit parameter.

        They are so for every divisor of this number as `size`, and for no other.
        """

    @property
    def unpadded_rows(self) -> int | None:
        """The rows without padding, if `shard` may add rows of zeros; None if it never does."""

    def hf_shapes(self) -> tuple[Shape, ...]:
        """Returns the shapes of the Hugging Face tensors."""

    def local_shape(self, size: int) -> Shape:
        """Returns the shape of the parameter on each of `size` ranks."""

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        """Cuts the parameter of rank `rank` of `size` from the Hugging Face tensors.

        Raises:
            ValueError: `size` does not divide the number of rows or heads.
        """

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        """Turns [ranks, *local shape] into the Hugging Face tensors, one at a time; they may be views."""


def _share(total: int, *, rank: int, size: int, unit: str) -> tuple[int, int]:
    """Returns the first of this rank's share of `total` units, and the one after its last."""
    if total % size:
        raise ValueError(f"{total} {unit} cannot be split over {size} tensor-parallel ranks")
    return rank * (total // size), (rank + 1) * (total // size)


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor, perhaps in another shape.

    An example is the patch embedding: a convolution whose stride is its kernel, held as the matrix that it is.
    """

    hf_shape: Shape
    shape: Shape
    partition_dim = None
    partition_stride = 1
    row_blocks = 1
    unpadded_rows = None

    @property
    def stacks_rows(self) -> bool:
        return self.hf_shape == self.shape

    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.hf_shape,)

    def local_shape(self, size: int) -> Shape:
        return self.shape

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        return hf[0][:].reshape(self.shape)

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards[0].reshape(self.hf_shape)


def whole(*shape: int) -> Replicated:
    """Makes the kind of a tensor that every rank holds in the checkpoint's own shape."""
    return Replicated(hf_shape=shape, shape=shape)


@dataclass(frozen=True)
class Split:
    """A tensor cut into equal shares: dim 0 of column-parallel weights and biases, dim 1 of row-parallel weights."""

    shape: Shape
    partition_dim: int
    partition_stride = 1
    stacks_rows = True
    unpadded_rows = None

    @property
    def row_blocks(self) -> int:
        return self.shape[0] if self.partition_dim == 0 else 1

    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def local_shape(self, size: int) -> Shape:
        _, high = _share(self.shape[self.partition_dim], rank=0, size=size, unit="rows or columns")
        return (*self.shape[: self.partition_dim], high, *self.shape[self.partition_dim + 1 :])

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _share(self.shape[self.partition_dim], rank=rank, size=size, unit="rows or columns")
        return hf[0][low:high] if self.partition_dim == 0 else hf[0][:, low:high]

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards.movedim(0, self.partition_dim).reshape(self.shape)


@dataclass(frozen=True)
class Gated:
    """The gate and up projections; each rank holds its share of gate, then its share of up."""

    rows: int
    tail: Shape
    """The remaining dimensions: (inputs,) for the weight, () for the bias."""
    partition_dim = 0
    partition_stride = 2
    stacks_rows = True
    row_blocks = 1
    unpadded_rows = None

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, *self.tail),) * 2

    def local_shape(self, size: int) -> Shape:
        _, high = _share(self.rows, rank=0, size=size, unit="rows of a gated MLP")
        return (2 * high, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _share(self.rows, rank=rank, size=size, unit="rows of a gated MLP")
        return torch.cat([projection[low:high] for projection in hf])

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        for half in shards.chunk(2, dim=1):
            yield half.reshape(self.rows, *self.tail)


@dataclass(frozen=True)
class GroupedQKV:
    """Three projections -> one, ordered by key-value head: the queries of its group, its key, its value.

    Hugging Face    q0 q1 q2 q3      k0 k1      v0 v1           4 heads, 2 key-value heads
    unsplit         q0 q1 k0 v0 q2 q3 k1 v1
    """

    heads: int
    kv_heads: int
    head_dim: int
    tail: Shape
    partition_dim = 0
    partition_stride = 1
    unpadded_rows = None

    @property
    def stacks_rows(self) -> bool:
        return self.kv_heads == 1

    @property
    def row_blocks(self) -> int:
        return self.kv_heads

    def hf_shapes(self) -> tuple[Shape, ...]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (query, *self.tail), (key, *self.tail), (key, *self.tail)

    def local_shape(self, size: int) -> Shape:
        return ((self.heads + 2 * self.kv_heads) * self.head_dim // size, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _share(self.kv_heads, rank=rank, size=size, unit="key-value heads")
        blocks = []
        for tensor, heads_per_group in zip(hf, self._heads_per_group(), strict=True):
            rows = heads_per_group * self.head_dim
            blocks.append(tensor[low * rows : high * rows].reshape(high - low, rows, *self.tail))
        return torch.cat(blocks, dim=1).reshape(-1, *self.tail)

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        rows = [heads * self.head_dim for heads in self._heads_per_group()]
        groups = shards.reshape(self.kv_heads, sum(rows), *self.tail)
        for block in groups.split(rows, dim=1):
            yield block.reshape(-1, *self.tail)

    def _heads_per_group(self) -> tuple[int, int, int]:
        return self.heads // self.kv_heads, 1, 1


@dataclass(frozen=True)
class FusedQKV:
    """One tensor of all queries, all keys, all values -> one ordered by head: its query, its key, its value.

    Hugging Face    q0 q1 k0 k1 v0 v1           2 heads
    unsplit         q0 k0 v0 q1 k1 v1
    """

    heads: int
    head_dim: int
    tail: Shape
    partition_dim = 0
    partition_stride = 1
    unpadded_rows = None

    @property
    def stacks_rows(self) -> bool:
        return self.heads == 1

    @property
    def row_blocks(self) -> int:
        return self.heads

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((3 * self.heads * self.head_dim, *self.tail),)

    def local_shape(self, size: int) -> Shape:
        return (3 * self.heads * self.head_dim // size, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _share(self.heads, rank=rank, size=size, unit="attention heads")
        starts = [number * self.heads * self.head_dim for number in range(3)]  # of queries, keys, values
        blocks = [
            hf[0][start + low * self.head_dim : start + high * self.head_dim].reshape(
                high - low, self.head_dim, *self.tail
            )
            for start in starts
        ]
        return torch.cat(blocks, dim=1).reshape(-1, *self.tail)

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        heads = shards.reshape(self.heads, 3, self.head_dim, *self.tail)
        yield heads.transpose(0, 1).reshape(-1, *self.tail)


@dataclass(frozen=True)
class Vocabulary:
    """One row per token, padded with rows of zeros to a multiple of the number of ranks and then split."""

    tokens: int
    hidden: int
    partition_dim = 0
    partition_stride = 1
    stacks_rows = True

    @property
    def row_blocks(self) -> int:
        return self.tokens

    @property
    def unpadded_rows(self) -> int:
        return self.tokens

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.tokens, self.hidden),)

    def local_shape(self, size: int) -> Shape:
        return (padded_vocabulary(self.tokens, size) // size, self.hidden)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        rows = self.local_shape(size)[0]
        low, high = min(rank * rows, self.tokens), min((rank + 1) * rows, self.tokens)
        real = hf[0][low:high]
        return torch.cat([real, real.new_zeros(rows - (high - low), self.hidden)])

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards.flatten(0, 1)[: self.tokens]


def padded_vocabulary(tokens: int, tensor_size: int) -> int:
    """Rounds the number of tokens up to a multiple of the tensor-parallel size."""
    return math.ceil(tokens / tensor_size) * tensor_size
