"""Which rows go together: to data-parallel ranks, and to packed micro-batches of one rank.

The loss does not depend on any of it (weights and denominators are final before); only balance and memory do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Groups = tuple[tuple[int, ...], ...]


def assign_to_ranks(lengths: Sequence[int], *, num_ranks: int) -> Groups:
    """Row indices per rank, ascending; row counts differ by at most one, token totals are balanced.

    Longest row first to the rank with the fewest tokens that still has room; ties go to the lower rank and lower row.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: at least one is needed")
    return _balanced(lengths, num_ranks)


def micro_batches(lengths: Sequence[int], *, rows_per_micro_batch: int) -> Groups:
    """Row indices per micro-batch, ascending: ceil(rows / rows_per_micro_batch) of them, balanced in tokens."""
    if rows_per_micro_batch < 1:
        raise ValueError(f"rows_per_micro_batch={rows_per_micro_batch}: at least one is needed")
    return _balanced(lengths, -(-len(lengths) // rows_per_micro_batch))


def _balanced(lengths: Sequence[int], num_groups: int) -> Groups:
    if num_groups == 0:
        return ()
    small, num_large = divmod(len(lengths), num_groups)  # num_large groups take one row more
    members: list[list[int]] = [[] for _ in range(num_groups)]
    open_groups = [(0, group) for group in range(num_groups)]
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, group = heapq.heappop(open_groups)
        members[group].append(row)
        if len(members[group]) > small:
            num_large -= 1
            if num_large == 0:  # no group may grow beyond `small` any more
                open_groups = [entry for entry in open_groups if len(members[entry[1]]) < small]
                heapq.heapify(open_groups)
        elif len(members[group]) < small or num_large > 0:
            heapq.heappush(open_groups, (tokens + lengths[row], group))
    return tuple(tuple(sorted(rows)) for rows in members)
