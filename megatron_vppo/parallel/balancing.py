"""Which groups of rows go to which data-parallel rank.

The loss does not depend on any of it (weights and denominators are final before); only balance and memory do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_to_ranks(lengths: Sequence[int], *, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Indices per rank, ascending; counts differ by at most one, token totals are balanced.

    Longest first to the rank with the fewest tokens that still has room; ties go to the lower rank and lower index.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: at least one is needed")
    small, num_large = divmod(len(lengths), num_ranks)  # num_large ranks take one row more
    members: list[list[int]] = [[] for _ in range(num_ranks)]
    open_ranks = [(0, rank) for rank in range(num_ranks)]
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
