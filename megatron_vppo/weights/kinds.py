"""The kinds of correspondence between Hugging Face tensors and the parameters of a Megatron model.

One immutable table of `Entry` per model family says which Hugging Face tensors make which parameter, and how. Loading,
export and the live stream to the rollout engines all read it. Kinds are pure: `shard` cuts what one tensor-parallel
rank holds, `merge` puts the shards of all ranks together again, bit by bit the same.

`shard` only slices its inputs along one dimension (`x[a:b]`, `x[:, a:b]`, `x[:]`), so it also takes the lazy slices of
a safetensors file and reads no more than this rank's part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_vppo.config.choices import ModelPart

Shape = tuple[int, ...]


class Kind(Protocol):
    """How the tensors of one entry become the parameter of a tensor-parallel rank, and back."""

    @property
    def partition_dim(self) -> int | None:
        """Dimension of the parameter that is split over ranks; None: every rank holds all of it."""

    @property
    def partition_stride(self) -> int:
        """Megatron's `stride`: how many interleaved blocks the split dimension consists of."""

    def hf_shapes(self) -> tuple[Shape, ...]: ...

    def local_shape(self, size: int) -> Shape: ...

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor: ...

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        """[ranks, *local shape] -> the Hugging Face tensors, each made when it is asked for; they may be views."""


def _part(total: int, *, rank: int, size: int, what: str) -> tuple[int, int]:
    if total % size:
        raise ValueError(f"{total} {what} cannot be split over {size} tensor-parallel ranks")
    return rank * (total // size), (rank + 1) * (total // size)


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor, perhaps in another shape (a convolution whose stride is its kernel)."""

    hf_shape: Shape
    shape: Shape
    partition_dim = None
    partition_stride = 1

    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.hf_shape,)

    def local_shape(self, size: int) -> Shape:
        return self.shape

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        return hf[0][:].reshape(self.shape)

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards[0].reshape(self.hf_shape)


def whole(*shape: int) -> Replicated:
    """Held by every rank, in the checkpoint's own shape."""
    return Replicated(hf_shape=shape, shape=shape)


@dataclass(frozen=True)
class Split:
    """Cut into equal parts: dim 0 for column-parallel weights and biases, dim 1 for row-parallel weights."""

    shape: Shape
    partition_dim: int
    partition_stride = 1

    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def local_shape(self, size: int) -> Shape:
        low, high = _part(self.shape[self.partition_dim], rank=0, size=size, what="rows or columns")
        return (*self.shape[: self.partition_dim], high - low, *self.shape[self.partition_dim + 1 :])

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _part(self.shape[self.partition_dim], rank=rank, size=size, what="rows or columns")
        return hf[0][low:high] if self.partition_dim == 0 else hf[0][:, low:high]

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards.movedim(0, self.partition_dim).reshape(self.shape)


@dataclass(frozen=True)
class Gated:
    """gate and up projections; each rank holds its part of gate, then its part of up."""

    rows: int
    tail: Shape
    """Remaining dimensions: (inputs,) for the weight, () for the bias."""
    partition_dim = 0
    partition_stride = 2

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, *self.tail),) * 2

    def local_shape(self, size: int) -> Shape:
        _, high = _part(self.rows, rank=0, size=size, what="rows of a gated MLP")
        return (2 * high, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _part(self.rows, rank=rank, size=size, what="rows of a gated MLP")
        return torch.cat([projection[low:high] for projection in hf])

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        for half in shards.chunk(2, dim=1):
            yield half.reshape(self.rows, *self.tail)


@dataclass(frozen=True)
class GroupedQKV:
    """Three projections -> one, ordered by key-value head: the queries of its group, its key, its value."""

    heads: int
    kv_heads: int
    head_dim: int
    tail: Shape
    partition_dim = 0
    partition_stride = 1

    def hf_shapes(self) -> tuple[Shape, ...]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (query, *self.tail), (key, *self.tail), (key, *self.tail)

    def local_shape(self, size: int) -> Shape:
        return ((self.heads + 2 * self.kv_heads) * self.head_dim // size, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _part(self.kv_heads, rank=rank, size=size, what="key-value heads")
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
    """One tensor [all queries; all keys; all values] -> one, ordered by head: its query, its key, its value."""

    heads: int
    head_dim: int
    tail: Shape
    partition_dim = 0
    partition_stride = 1

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((3 * self.heads * self.head_dim, *self.tail),)

    def local_shape(self, size: int) -> Shape:
        return (3 * self.heads * self.head_dim // size, *self.tail)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        low, high = _part(self.heads, rank=rank, size=size, what="attention heads")
        starts = [part * self.heads * self.head_dim for part in range(3)]
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
    """Rows of tokens, split over ranks after padding with zero rows to a multiple of their number."""

    tokens: int
    hidden: int
    partition_dim = 0
    partition_stride = 1

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.tokens, self.hidden),)

    def local_shape(self, size: int) -> Shape:
        return (padded_vocabulary(self.tokens, size) // size, self.hidden)

    def shard(self, hf: Sequence[Any], *, rank: int, size: int) -> Tensor:
        rows = self.local_shape(size)[0]
        low, high = min(rank * rows, self.tokens), min((rank + 1) * rows, self.tokens)
        real = hf[0][low:high] if high > low else hf[0][0:1][:0]
        return torch.cat([real, real.new_zeros(rows - (high - low), self.hidden)])

    def merge(self, shards: Tensor) -> Iterator[Tensor]:
        yield shards.flatten(0, 1)[: self.tokens]


def padded_vocabulary(tokens: int, tensor_size: int) -> int:
    """The least multiple of the tensor-parallel size that holds all tokens."""
    return math.ceil(tokens / tensor_size) * tensor_size


@dataclass(frozen=True)
class Entry:
    """One parameter of the whole model."""

    template: str
    """Its name in a pipeline stage's `named_parameters()`, with `{}` for the layer's number within the stage."""
    hf_names: tuple[str, ...]
    """As in released checkpoints, in the order that `kind` takes and gives them."""
    kind: Kind
    place: Literal["first", "layer", "last"]
    """Pipeline stage: the first, the one that holds language layer `layer`, or the last. Stages count in the order of
    the model; a rank may hold several."""
    layer: int | None = None
    """Number in the whole model of the language layer that `{}` stands for."""
    part: ModelPart = "language_model"
    copy: bool = False
    """A second holder of tensors that another entry has: the tied output layer of a pipeline's last stage. Loaded, kept
    equal by the optimizer step, never exported."""

    def stage(self, stage_layers: Sequence[int]) -> int:
        """Which pipeline stage holds it, given the number of language layers of each stage."""
        if self.place != "layer":
            return 0 if self.place == "first" else len(stage_layers) - 1
        return self._stage_and_local_layer(stage_layers)[0]

    def local_name(self, stage_layers: Sequence[int]) -> str:
        """Its name in the `named_parameters()` of that stage."""
        if self.place != "layer":
            return self.template
        return self.template.format(self._stage_and_local_layer(stage_layers)[1])

    def _stage_and_local_layer(self, stage_layers: Sequence[int]) -> tuple[int, int]:
        assert self.layer is not None
        local = self.layer
        for stage, layers in enumerate(stage_layers):
            if local < layers:
                return stage, local
            local -= layers
        raise ValueError(f"layer {self.layer} lies beyond the {sum(stage_layers)} layers of the stages {stage_layers}")


def stage_entries(entries: Iterable[Entry], *, stage_layers: Sequence[int], stage: int) -> list[Entry]:
    """What one pipeline stage holds, tied copies included (they exist only where the two holders are apart)."""
    return [
        entry for entry in entries if entry.stage(stage_layers) == stage and not (entry.copy and len(stage_layers) == 1)
    ]


def stream_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Everything once, in the order of the model: what an export walks over."""
    return [entry for entry in entries if not entry.copy]
