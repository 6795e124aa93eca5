"""The assignment of groups of rows to data-parallel ranks.

Only balance and memory depend on it. The loss does not: weights and denominators are final before.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_to_ranks(lengths: Sequence[float], *, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Assigns items to ranks by length: counts differ by at most one, and totals are balanced.

    The longest item goes first, to the rank with the smallest total that still has room. Ties go to the lower rank and
    the lower index.

    Returns:
        Ascending indices per rank.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; at least one is needed")
    small, num_large = divmod(len(lengths), num_ranks)  # num_large ranks take one item more
    members: list[list[int]] = [[] for _ in range(num_ranks)]
    open_ranks = [(0.0, rank) for rank in range(num_ranks)]
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = heapq.heappop(open_ranks)
        members[rank].append(row)
        if len(members[rank]) > small:
            num_large -= 1
            if num_large == 0:  # no rank may grow beyond `small` any more
                open_ranks = [entry for entry in open_ranks if len(members[entry[1]]) < small]
                heapq.heapify(open_ranks)
        elif len(members[rank]) < small or num_large > 0:
            heapq.heappush(open_ranks, (tokens + lengths[row], rank))
    return tuple(tuple(sorted(rows)) for rows in members)
