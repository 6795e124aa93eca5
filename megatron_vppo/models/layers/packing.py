"""The lengths of packed sequences, and what follows from them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """Sequences that lie one after the other in one row of tokens; attention never crosses from one to the next.

    Packing((3, 4, 2, 3), ends_in_filler=True):

    tokens  | 0  1  2 | 3  4  5  6 | 7  8 | 9 10 11 |
              first     second      third   filler
    starts    0         3            7      9
    """

    lengths: tuple[int, ...]
    """Tokens of each sequence, in order, padding included."""
    ends_in_filler: bool = False
    """True if the last sequence is padding alone: it makes the tokens divide evenly over the ranks."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """The index of each sequence's first token."""
        return tuple(itertools.accumulate(self.lengths, initial=0))[:-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)
