"""All ranks leave a check together, whichever of them found something."""

from __future__ import annotations

import pytest

from megatron_vppo.system.agreement import any_rank, gathered, on_every_rank
from tests.gloo import run_gloo


class _Mine(ValueError):
    pass


def _rank(rank: int, world: int) -> list[tuple[str, str]]:
    def check(bad: tuple[int, ...]) -> int:
        if rank in bad:
            raise _Mine(f"rank {rank} of {bad}")
        return rank

    assert on_every_rank(lambda: check(())) == rank
    assert gathered(10 * rank) == [0, 10, 20]
    assert [any_rank(rank in those) for those in ((), (1,), (0, 2))] == [False, True, True]
    found = []
    for bad in ((0,), (1,), (2, 1)):
        with pytest.raises(ValueError, match="rank") as refused:
            on_every_rank(lambda bad=bad: check(bad))  # type: ignore[misc]
        found.append((type(refused.value).__name__, str(refused.value)))
    return found


@pytest.mark.distributed
def test_the_first_rank_that_finds_something_speaks_for_all() -> None:
    said = [("_Mine", "rank 0 of (0,)"), ("_Mine", "rank 1 of (1,)"), ("_Mine", "rank 1 of (2, 1)")]
    assert run_gloo(_rank, 3) == [said] * 3
