"""The kinds of correspondence between Hugging Face tensors and the parameters of a Megatron model.

Kinds are pure: `shard` cuts what one tensor-parallel rank holds, and `merge` puts the shards of all ranks together
again, bit for bit. It does so by `views`, which copy nothing: the values of a tensor in their order, wherever they lie
in the shards. So shards can be sent as they were gathered, and whoever copies them next puts them in order.

`shard` only slices its inputs along one dimension (`x[a:b]`, `x[:, a:b]`, `x[:]`), so it also takes tensors that still
lie in a safetensors file (`hf_folder.FileTensor`), and reads no more of them than this rank needs.

A new kind is one class here, since no other file asks which kind it has. The "unsplit" parameter is the one that a rank
holds with tensor-parallel size 1, without padding. A gated projection of 4 rows on 2 ranks, for example:

    Hugging Face        gate: g0 g1 g2 g3      up: u0 u1 u2 u3
    unsplit             g0 g1 g2 g3 u0 u1 u2 u3
    shard, rank 0       g0 g1 u0 u1
    shard, rank 1       g2 g3 u2 u3

Where a width is padded, each rank's share of it ends in zeros (docs/adr/0024-padded-widths.md). The same projection
with shares of 3 rows instead of 2:

    shard, rank 0       g0 g1 0 u0 u1 0
    shard, rank 1       g2 g3 0 u2 u3 0
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vppo.weights.padded_widths import pad_end, share_padding

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
        """The rows without padding, if `shard` may add rows of zeros on the last ranks; None if it never does."""

    def padding(self, size: int) -> int:
        """Returns the rows or columns of zeros, along `partition_dim`, that end each rank's share of each tensor.

        Every rank has as many, and no checkpoint holds them.
        """

    def hf_shapes(self) -> tuple[Shape, ...]:
        """Returns the shapes of the Hugging Face tensors."""

    def local_shape(self, size: int) -> Shape:
        """Returns the shape of the parameter on each of `size` ranks."""

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        """Cuts the parameter of rank `rank` of `size` from the Hugging Face tensors.

        Raises:
            ValueError: `size` does not divide the number of rows or heads.
        """

    def views(self, shards: Tensor) -> Iterator[Tensor]:
        """Finds the Hugging Face tensors in contiguous [ranks, *local shape].

        Yields one view for each, of more dimensions than the tensor where its values lie apart: `reshape` to the
        tensor's shape, which copies then, gives the tensor.
        """


def merge(kind: Kind, shards: Tensor) -> Iterator[Tensor]:
    """Turns [ranks, *local shape] into the Hugging Face tensors, one at a time; they may be views."""
    for view, shape in zip(kind.views(shards), kind.hf_shapes(), strict=True):
        yield view.reshape(shape)


def share_of(total: int, *, rank: int, size: int, unit: str) -> tuple[int, int]:
    """Returns the first of a rank's share of `total` units, and the one after its last."""
    if total % size:
        raise ValueError(f"{total} {unit} cannot be split over {size} tensor-parallel ranks")
    return rank * (total // size), (rank + 1) * (total // size)


class Unpadded:
    """The kinds whose shares are never padded to WIDTH_MULTIPLE."""

    def padding(self, size: int) -> int:
        return 0


@dataclass(frozen=True)
class Replicated(Unpadded):
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

    def views(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards[0]


def whole(*shape: int) -> Replicated:
    """Makes the kind of a tensor that every rank holds in the checkpoint's own shape."""
    return Replicated(hf_shape=shape, shape=shape)


@dataclass(frozen=True)
class Split:
    """A tensor cut into equal shares: dim 0 of column-parallel weights and biases, dim 1 of row-parallel weights."""

    shape: Shape
    partition_dim: int
    padded: bool = False
    """True if each rank's share is padded to WIDTH_MULTIPLE."""
    partition_stride = 1
    stacks_rows = True
    unpadded_rows = None

    @property
    def row_blocks(self) -> int:
        return self.shape[0] if self.partition_dim == 0 and not self.padded else 1

    def padding(self, size: int) -> int:
        return share_padding(self.shape[self.partition_dim], size) if self.padded else 0

    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def local_shape(self, size: int) -> Shape:
        _, high = share_of(self.shape[self.partition_dim], rank=0, size=size, unit="rows or columns")
        held = high + self.padding(size)
        return (*self.shape[: self.partition_dim], held, *self.shape[self.partition_dim + 1 :])

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = share_of(self.shape[self.partition_dim], rank=rank, size=size, unit="rows or columns")
        share = hf[0][low:high] if self.partition_dim == 0 else hf[0][:, low:high]
        return pad_end(share, self.padding(size), dim=self.partition_dim)

    def views(self, shards: Tensor) -> Iterator[Tensor]:
        real = self.shape[self.partition_dim] // len(shards)
        yield shards.narrow(self.partition_dim + 1, 0, real).movedim(0, self.partition_dim)


@dataclass(frozen=True)
class Gated:
    """The gate and up projections; each rank holds its share of gate, then its share of up."""

    rows: int
    tail: Shape
    """The remaining dimensions: (inputs,) for the weight, () for the bias."""
    padded: bool = False
    """True if each rank's shares of gate and of up are padded to WIDTH_MULTIPLE."""
    partition_dim = 0
    partition_stride = 2
    stacks_rows = True
    row_blocks = 1
    unpadded_rows = None

    def padding(self, size: int) -> int:
        return share_padding(self.rows, size) if self.padded else 0

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, *self.tail),) * 2

    def local_shape(self, size: int) -> Shape:
        _, high = share_of(self.rows, rank=0, size=size, unit="rows of a gated MLP")
        return (2 * (high + self.padding(size)), *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = share_of(self.rows, rank=rank, size=size, unit="rows of a gated MLP")
        return torch.cat([pad_end(projection[low:high], self.padding(size), dim=0) for projection in hf])

    def views(self, shards: Tensor) -> Iterator[Tensor]:
        for half in shards.chunk(2, dim=1):
            yield half[:, : self.rows // len(shards)]


@dataclass(frozen=True)
class Vocabulary(Unpadded):
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

    def views(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards.flatten(0, 1)[: self.tokens]


def stored_shape(kind: Kind) -> Shape:
    """Returns the shape of the unsplit parameter."""
    shape = list(kind.local_shape(1))
    if kind.partition_dim is not None:
        shape[kind.partition_dim] -= kind.padding(1) * kind.partition_stride
    return tuple(shape)


def padded_vocabulary(tokens: int, tensor_size: int) -> int:
    """Rounds the number of tokens up to a multiple of the tensor-parallel size."""
    return math.ceil(tokens / tensor_size) * tensor_size
