"""Continuations of prefixes (see Packing) for attention that takes bounds: which keys each of them sees.

Shape suffix legend: C = tokens of this context-parallel rank, which has all of them; H = attention heads of this rank;
E = values per attention head.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vppo.models.layers.packing import Packing

CONTINUED_MASK = "padding_causal_bottom_right"
"""TransformerEngine's name for a mask by which the queries of a sequence are the last of its keys."""


@dataclass(frozen=True)
class ContinuedBounds:
    """Continuations of prefixes (see Packing), in a call of their own: their keys are those of the prefix, and then
    their own.
    """

    first: int
    """The number of tokens before the first continuation."""
    prefixes: tuple[tuple[slice, int], ...]
    """The tokens of each prefix, and the number of its continuations."""
    order: Tensor
    """int64 [keys]: the place of each key among the tokens of all prefixes, each as often as it has continuations, and
    then the tokens of the continuations."""
    bounds: Tensor
    key_bounds: Tensor
    """int32 [continuations + 1]: where the queries and the keys of each begin, and the end of the last."""
    longest: int
    longest_keys: int

    def keys(self, x_CHE: Tensor) -> Tensor:
        """Puts the keys (or values) of prefixes in front of those of their continuations.

        `expand` lets autograd sum a prefix's gradient over its continuations in one step, in the same order every time;
        `order` takes every place once.
        """
        copies = [x_CHE[tokens].expand(times, -1, -1, -1).flatten(0, 1) for tokens, times in self.prefixes]
        return torch.cat([*copies, x_CHE[self.first :]]).index_select(0, self.order)


def bounds_of(lengths: Sequence[int]) -> Tensor:
    """Returns int32 [sequences + 1]: where each begins, and the end of the last."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def continued_bounds(packing: Packing) -> ContinuedBounds:
    """Works out the bounds and the order of the keys of a packing's continuations."""
    lengths = packing.lengths[packing.num_whole :]
    times = Counter(packing.prefixes)  # in the order of their first continuations
    copies_of = {}  # where the copies of each prefix begin
    done = 0
    for prefix, copies in times.items():
        copies_of[prefix] = iter(range(done, done + copies * packing.lengths[prefix], packing.lengths[prefix]))
        done += copies * packing.lengths[prefix]
    order = []
    for prefix, length in zip(packing.prefixes, lengths, strict=True):
        copy = next(copies_of[prefix])
        order += [np.arange(copy, copy + packing.lengths[prefix]), np.arange(done, done + length)]
        done += length
    key_lengths = [packing.lengths[prefix] + n for prefix, n in zip(packing.prefixes, lengths, strict=True)]
    spans = {
        prefix: slice(packing.starts[prefix], packing.starts[prefix] + packing.lengths[prefix]) for prefix in times
    }
    return ContinuedBounds(
        first=packing.whole.num_tokens,
        prefixes=tuple((spans[prefix], copies) for prefix, copies in times.items()),
        order=torch.from_numpy(np.concatenate(order)),
        bounds=bounds_of(lengths),
        key_bounds=bounds_of(key_lengths),
        longest=max(lengths),
        longest_keys=max(key_lengths),
    )
