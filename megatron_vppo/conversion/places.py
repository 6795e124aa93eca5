"""Where a parameter lies in a distributed checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vppo.weights.kinds import Entry, Shape


@dataclass(frozen=True)
class StoredPart:
    """A block of rows of a parameter, as one rank alone would hold it."""

    key: str
    """Of the tensor in the checkpoint; the layers of a tower share one, stacked."""
    size: Shape
    """Of that tensor."""
    offset: Shape
    """Of this block in it."""
    row: int
    """Of the parameter, the first in this block."""
    rows: int
    stacked: int
    """Leading dimensions of the tensor that the parameter does not have."""

    def block(self, low: int, high: int) -> tuple[Shape, Shape]:
        """(offset, sizes) in the tensor `key` of the parameter's rows `low` to `high`, which lie in this part."""
        first = self.stacked
        offset = (*self.offset[:first], self.offset[first] + low - self.row, *self.offset[first + 1 :])
        return offset, (*(1,) * first, high - low, *self.size[first + 1 :])


@dataclass(frozen=True)
class StoredEntry:
    entry: Entry
    shape: Shape
    """Of the parameter on one rank alone."""
    parts: tuple[StoredPart, ...]
