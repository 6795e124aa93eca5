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

    The last sequences may go on from an earlier one, their prefix, which then is there once for all of them. A token of
    such a continuation sees all of the prefix, and its own sequence up to itself. Packing((3, 2, 1, 2), prefixes=(0,
    0)) has a prompt of three tokens, a row of two, and two answers to the prompt:

    tokens  | 0  1  2 | 3  4 | 5 | 6  7 |
              prompt    row    a    b         token 7 sees 0 1 2 6 7
    """

    lengths: tuple[int, ...]
    """Tokens of each sequence, in order, padding included."""
    ends_in_filler: bool = False
    """True if the last sequence is padding alone: it makes the tokens divide evenly over the ranks."""
    prefixes: tuple[int, ...] = ()
    """The number of the prefix of each continuation; the continuations are the last sequences. A prefix is no
    continuation itself."""

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

    @property
    def num_whole(self) -> int:
        """The number of sequences that are no continuations."""
        return len(self.lengths) - len(self.prefixes)

    @property
    def whole(self) -> Packing:
        """The packing without its continuations."""
        return Packing(self.lengths[: self.num_whole], self.ends_in_filler) if self.prefixes else self
