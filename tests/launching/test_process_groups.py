"""Groups of all ranks, by hand; and that ranks which disagree are found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vppo.config.schema import ParallelConfig
from megatron_vppo.launching.process_groups import Membership, check_memberships, crosses_hosts, memberships


@pytest.fixture(scope="module")
def ranks() -> list[Membership]:
    return memberships(
        ParallelConfig(
            tensor_model_parallel_size=2, context_parallel_size=2, pipeline_model_parallel_size=2, vision_split="images"
        ),
        world_size=16,
    )


def test_groups_by_hand(ranks: list[Membership]) -> None:
    """rank = ((pipeline * 2 + data) * 2 + context) * 2 + tensor."""
    assert ranks[0] == Membership((0, 0, 0, 0), ((0, 1), (0, 2), (0, 8), (0, 4)))
    assert ranks[13] == Membership((1, 0, 1, 1), ((12, 13), (13, 15), (5, 13), (9, 13)))
    check_memberships(ranks)


def test_ranks_that_disagree_are_found(ranks: list[Membership]) -> None:
    other = replace(ranks[13], groups=((12, 13), (13, 15), (5, 13), (11, 13)))
    with pytest.raises(AssertionError, match="disagree"):
        check_memberships([*ranks[:13], other, *ranks[14:]])
    with pytest.raises(AssertionError, match="the same place"):
        check_memberships([*ranks[:13], replace(ranks[13], place=ranks[12].place), *ranks[14:]])
    with pytest.raises(AssertionError, match="rank 0 has another place in its group"):
        check_memberships([replace(ranks[0], place=(7, 0, 0, 0)), *ranks[1:]])
    with pytest.raises(AssertionError, match="differ along another axis"):
        check_memberships([*ranks[:13], replace(ranks[13], place=(1, 0, 1, 7)), *ranks[14:]])


def test_groups_over_hosts(ranks: list[Membership]) -> None:
    assert not crosses_hosts(ranks, axis="tensor", ranks_per_host=4)
    assert crosses_hosts(ranks, axis="tensor", ranks_per_host=3)
    assert crosses_hosts(ranks, axis="pipeline", ranks_per_host=8) and not crosses_hosts(
        ranks, axis="pipeline", ranks_per_host=16
    )
