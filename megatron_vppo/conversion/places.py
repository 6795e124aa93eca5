"""The place of a parameter in a distributed checkpoint, and of Hugging Face tensors within a parameter.

Parameters are meant as they are with tensor-parallel size 1, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vppo.weights.entries import Entry
from megatron_vppo.weights.kinds import Shape


@dataclass(frozen=True)
class StoredBlock:
    """A range of rows of a parameter, which the checkpoint keeps in one place.

    Example: rows 0 to 100 of the third layer's [100, 64] weight are [1, 100, 64] at offset (2, 0, 0) of a tensor of
    size [28, 100, 64], because the 28 layers of a tower share one tensor. Then `stacked` is 1.
    """

    key: str
    """The name of the tensor in the checkpoint."""
    size: Shape
    """The shape of that tensor."""
    offset: Shape
    """The position of this block in it."""
    row: int
    """The row of the parameter that is the first of this block."""
    rows: int
    """The number of rows in this block."""
    stacked: int
    """The number of leading dimensions of the tensor that the parameter does not have."""

    @property
    def end(self) -> int:
        """The row of the parameter after the last one in this block."""
        return self.row + self.rows

    def region(self, low: int, high: int) -> tuple[Shape, Shape]:
        """Returns (offset, sizes) in the tensor `key` of the parameter's rows `low` to `high`, all in this block."""
        first = self.stacked
        offset = (*self.offset[:first], self.offset[first] + low - self.row, *self.offset[first + 1 :])
        return offset, (*(1,) * first, high - low, *self.size[first + 1 :])


@dataclass(frozen=True)
class StoredEntry:
    """One entry of the weight map with its place in the checkpoint."""

    entry: Entry
    shape: Shape
    """The shape of the unsplit parameter (weights/kinds.py)."""
    blocks: tuple[StoredBlock, ...]
    """In the order of the rows; one, except for gated projections, whose halves are stored apart."""


def rows_by_tensor(low: int, high: int, heights: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Finds the rows `low` to `high` of a parameter that is several tensors, one below the other.

    Args:
        heights: the number of rows of each tensor.

    Yields:
        (number of the tensor, its first row, the one after its last), without gaps and in the order of the rows.
    """
    first = 0  # row of the parameter that is row 0 of the tensor
    for number, height in enumerate(heights):
        begin, end = max(low, first), min(high, first + height)
        if begin < end:
            yield number, begin - first, end - first
        first += height
