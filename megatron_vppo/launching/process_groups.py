"""The process groups of every rank of a run, compared with one another: what one rank believes, its peers have to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_vppo.config.schema import ParallelConfig
from megatron_vppo.launching.fake_world import fake_rank
from megatron_vppo.parallel.layout import Layout

AXES = ("tensor", "context", "pipeline", "data")


@dataclass(frozen=True)
class Membership:
    """One rank's place, and the ranks of its group along each axis."""

    place: tuple[int, ...]
    """The rank's number along each of AXES."""
    groups: tuple[tuple[int, ...], ...]
    """The ranks of its group along each of AXES."""


def memberships(parallel: ParallelConfig, *, world_size: int) -> list[Membership]:
    """Joins the groups as every rank in turn."""
    found = []
    for rank in range(world_size):
        with fake_rank(parallel, rank=rank, world_size=world_size) as layout:
            found.append(_membership(layout))
    return found


def _membership(layout: Layout) -> Membership:
    groups = (layout.groups.tp, layout.groups.cp, layout.groups.pp, layout.groups.dp)
    return Membership(
        place=(layout.tensor_rank, layout.context_rank, layout.pipeline_rank, layout.data_rank),
        groups=tuple(tuple(dist.get_process_group_ranks(group)) for group in groups),
    )


def check_memberships(ranks: Sequence[Membership]) -> None:
    """Asserts that all members of a group agree on it and differ along its axis alone, and that no place is taken
    twice.
    """
    assert len({rank.place for rank in ranks}) == len(ranks), "two ranks have the same place"
    for number, rank in enumerate(ranks):
        for axis, group in enumerate(rank.groups):
            assert group.index(number) == rank.place[axis], f"rank {number} has another place in its group"
            for member in group:
                other = ranks[member]
                assert other.groups[axis] == group, f"ranks {number} and {member} disagree on a group"
                elsewhere = [which for which in range(len(AXES)) if which != axis]
                alike = all(other.place[which] == rank.place[which] for which in elsewhere)
                assert alike, f"ranks {number} and {member} share a group and differ along another axis"


def crosses_hosts(ranks: Sequence[Membership], *, axis: str, ranks_per_host: int) -> bool:
    """Returns True if a group along the axis has ranks on several hosts."""
    which = AXES.index(axis)
    return any(len({member // ranks_per_host for member in rank.groups[which]}) > 1 for rank in ranks)
