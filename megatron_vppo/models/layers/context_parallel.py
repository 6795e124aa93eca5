"""Context parallelism: which tokens of packed sequences each rank works on.

Every sequence is cut into twice as many chunks as there are ranks, and each rank takes one from the front and one from
the back: its queries then meet as many keys as those of any other rank. Shape suffix legend: T = tokens of one rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def own_chunks(*, rank: int, size: int) -> tuple[int, int]:
    """The two chunks of each sequence, out of 2 * size."""
    return rank, 2 * size - 1 - rank


@functools.lru_cache(maxsize=64)
def own_tokens(lengths: tuple[int, ...], *, rank: int, size: int) -> Tensor:
    """int64 [T], rising within each sequence: indices into the packed tokens of all ranks.

    Raises:
        ValueError: a length that does not divide into 2 * size chunks.
    """
    if size == 1:
        return torch.arange(sum(lengths))
    if any(length % (2 * size) for length in lengths):
        raise ValueError(f"sequences of {list(lengths)} tokens over {size} ranks must be multiples of {2 * size}")
    indices, start = [], 0
    for length in lengths:
        chunk = length // (2 * size)
        indices += [torch.arange(chunk) + start + number * chunk for number in own_chunks(rank=rank, size=size)]
        start += length
    return torch.cat(indices)


def padded_lengths(lengths: Sequence[int], *, tensor: int, context: int, alignment: int = 1) -> list[int]:
    """Lengths that the sequences must be padded to. With context parallelism they depend on nothing but each length, so
    that two views of a row are cut alike; a further length at the end may then be that of a sequence of padding.

    Args:
        tensor: ranks that share the tokens of a context-parallel rank (sequence parallelism; 1: none).
        alignment: what the tokens of every rank must be a multiple of.
    """
    together = context * tensor * alignment
    if context == 1:
        *others, last = lengths
        return [*others, last + -sum(lengths) % together]
    each = context * math.lcm(2, tensor)
    padded = [math.ceil(length / each) * each for length in lengths]
    missing = -sum(padded) % math.lcm(each, together)
    return [*padded, missing] if missing else padded
