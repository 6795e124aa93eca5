"""A tensor whose values lie apart in a buffer, which is put in order by the copy that reads it, and not before.

Shards of several ranks lie in a buffer one after the other. Two shards of a matrix that is split by columns, for
example:

    the matrix    a b c d        in the buffer    a b e f c d g h
                  e f g h        as a view        [2, 2, 2] with strides (2, 4, 1): row, shard, column of the shard

No strides make a matrix of two dimensions of that. `reshape` would copy all of it, and vLLM copies its share of the
result once more. Copied into a view of the target with the same dimensions, the values come to their places at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Shape = tuple[int, ...]

_aten = torch.ops.aten


def in_order(lying: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a tensor of this shape with the values of `lying` in their order, and copies none of them.

    It is a view of `lying` if there is one. Else it is a `Scattered`, as long as each of its dimensions is one or more
    whole dimensions of `lying`; if not even that is so, the values are copied.
    """
    wanted = tuple(shape)
    try:
        return lying.view(wanted)
    except RuntimeError:  # the only way to ask torch whether there is such a view
        return lying.reshape(wanted) if _parts(tuple(lying.shape), wanted) is None else Scattered(lying, wanted)


class Scattered(Tensor):
    """The tensor above. It can be cut along a dimension and be copied from; all else works on a copy in order."""

    lying: Tensor
    """The values where they are, in more dimensions."""

    @staticmethod
    def __new__(cls, lying: Tensor, shape: Shape) -> Scattered:
        made: Scattered = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=lying.dtype, device=lying.device
        )
        made.lying = lying
        return made

    def whole(self) -> Tensor:
        """Returns a copy in order."""
        return self.lying.reshape(self.shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.copy_.default and isinstance(args[1], cls):
            target, source = args[0], args[1].lying
            target.view(source.shape).copy_(source)
            return target
        if func is _aten.detach.default:
            return cls(args[0].lying, tuple(args[0].shape))
        if func is _aten.slice.Tensor and (cut := args[0]._cut(*args[1:])) is not None:
            return cut
        return func(*tree_map_only(cls, cls.whole, args), **tree_map_only(cls, cls.whole, dict(kwargs or {})))

    def _cut(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor | None:
        """Cuts values out of a dimension. Returns None if they begin or end in the middle of a run of them."""
        first, last, _ = slice(start, end).indices(self.shape[dim])
        parts = _parts(tuple(self.lying.shape), tuple(self.shape))
        assert parts is not None
        before = sum(parts[: dim % self.ndim])
        shape = (*self.shape[: dim % self.ndim], last - first, *self.shape[dim % self.ndim + 1 :])
        cut = self.lying
        for inner in range(before, before + parts[dim % self.ndim]):
            run = math.prod(self.lying.shape[inner + 1 : before + parts[dim % self.ndim]])
            if first % run == last % run == 0:
                cut = cut.narrow(inner, first // run, (last - first) // run)
                return in_order(cut, shape) if step == 1 else None
            if first // run != (last - 1) // run:
                return None
            cut = cut.narrow(inner, first // run, 1)
            first, last = first % run, last - first // run * run
        return None


def _parts(lying: Shape, shape: Shape) -> tuple[int, ...] | None:
    """Returns the number of dimensions of `lying` that make each of `shape`; None if one makes parts of two."""
    found, start = [], 0
    for size in shape:
        end = start + 1
        while end < len(lying) and math.prod(lying[start:end]) < size:
            end += 1
        if math.prod(lying[start:end]) != size:
            return None
        found.append(end - start)
        start = end
    return tuple(found) if start == len(lying) else None
