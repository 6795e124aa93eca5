"""Context parallelism: which tokens of packed sequences each rank works on.

Shape suffix legend: C = tokens of one context-parallel rank.

Every sequence is cut into twice as many chunks as there are ranks. Rank r holds chunk r and chunk 2 * size - 1 - r. Two
ranks, a sequence of 8 tokens and one of 4:

    packed tokens   0  1 | 2  3 | 4  5 | 6  7 || 8 | 9 | 10 | 11
    chunk             0      1      2      3     0   1    2    3
    held by rank      0      1      1      0     0   1    1    0

    rank 0: tokens 0 1 6 7 8 11        rank 1: tokens 2 3 4 5 9 10

Attention is causal: a query meets the keys before it, so late chunks cost more than early ones. A chunk from the front
and its mirror image from the back together cost the same for every rank. In the first sequence, rank 0 meets 1 + 2 + 7
+ 8 keys and rank 1 meets 3 + 4 + 5 + 6, both 18. Two halves would cost 10 and 26.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_vppo.models.layers.packing import Packing


def chunks_of_rank(*, rank: int, size: int) -> tuple[int, int]:
    """Returns the numbers of a rank's two chunks of each sequence, out of 2 * size."""
    return rank, 2 * size - 1 - rank


@functools.lru_cache(maxsize=64)
def tokens_of_rank(packing: Packing, *, rank: int, size: int) -> Tensor:
    """Returns int64 [C]: the indices of a rank's tokens among all packed tokens, rising.

    Raises:
        ValueError: a length that does not divide into 2 * size chunks.
    """
    if size == 1:
        return torch.arange(packing.num_tokens)
    if any(length % (2 * size) for length in packing.lengths):
        raise ValueError(
            f"sequences of {list(packing.lengths)} tokens over {size} ranks must be multiples of {2 * size}"
        )
    indices = []
    for start, length in zip(packing.starts, packing.lengths, strict=True):
        chunk = length // (2 * size)
        indices += [torch.arange(chunk) + start + number * chunk for number in chunks_of_rank(rank=rank, size=size)]
    return torch.cat(indices)


def padded_packing(
    lengths: Sequence[int],
    *,
    tensor: int,
    context: int,
    alignment: int = 1,
    prefixes: tuple[int, ...] = (),
    round_up: Callable[[int], int] = int,
) -> Packing:
    """Pads sequences so that every rank gets equally many tokens, and context parallelism equal chunks.

    Without context parallelism the last sequence takes all of the padding. With it, the padding of a sequence depends
    on its own length alone, so that both views of a response are cut at the same places; what is then still missing
    becomes a filler sequence.

    Args:
        lengths: tokens of each sequence.
        tensor: ranks that share the tokens of a context-parallel rank (sequence parallelism; 1: none).
        alignment: the tokens of every rank become a multiple of this.
        prefixes: those of the last sequences, see Packing. Context parallelism takes none.
        round_up: (tokens of all ranks) -> the number that they are to be padded to; the default pads no more than ranks
            need.
    """
    together = context * tensor * alignment
    if context == 1:
        *others, last = lengths
        total = math.ceil(round_up(sum(lengths)) / together) * together
        return Packing((*others, last + total - sum(lengths)), prefixes=prefixes)
    assert not prefixes, "a continuation has no chunks of its own"
    each = context * math.lcm(2, tensor)
    padded = tuple(math.ceil(length / each) * each for length in lengths)
    multiple = math.lcm(each, together)
    missing = math.ceil(round_up(sum(padded)) / multiple) * multiple - sum(padded)
    return Packing((*padded, missing), ends_in_filler=True) if missing else Packing(padded)
