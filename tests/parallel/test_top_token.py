"""The drop of the top token's probability, by hand; over ranks: tests/parallel/test_vocab_head.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_vppo.parallel.top_token import top_token_drop
from tests.gloo import run_gloo

P = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.3, 0.3]], dtype=torch.float64)
Q = torch.tensor([[0.1, 0.2, 0.5, 0.2], [0.1, 0.3, 0.3, 0.3], [0.2, 0.2, 0.2, 0.4]], dtype=torch.float64)
EXPECTED = [0.2, 0.6, 0.1]
"""Among equally likely tokens the first: 0.4 - 0.2, not 0.4 - 0.5; and 0.3 - 0.2, not 0.3 - 0.4."""
TEMPERATURE = 0.5


def drop(start: int, stop: int, group: dist.ProcessGroup | None) -> list[float]:
    """That of a slice of the vocabulary. The logits are shifted, and log-sum-exp says by how much."""
    logits, perturbed = (((p.log() + 3.0) * TEMPERATURE)[:, start:stop] for p in (P, Q))
    shift = torch.full((3,), 3.0, dtype=torch.float64)
    return top_token_drop(
        logits, perturbed, shift, shift, temperature=TEMPERATURE, vocab_start=start, group=group
    ).tolist()


def test_by_hand() -> None:
    assert drop(0, 4, None) == pytest.approx(EXPECTED)


def _rank(rank: int, world: int, cuts: tuple[int, ...]) -> list[float]:
    return drop(cuts[rank], cuts[rank + 1], dist.group.WORLD)


@pytest.mark.distributed
@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 4, 4)], ids=["equal tokens on both ranks", "a rank without rows"])
def test_the_parts_of_all_slices_add_up(cuts: tuple[int, ...]) -> None:
    parts = run_gloo(_rank, 2, cuts)
    assert [sum(of_ranks) for of_ranks in zip(*parts, strict=True)] == pytest.approx(EXPECTED)
    assert all(0.0 in of_ranks for of_ranks in zip(*parts, strict=True)), "one rank holds the token"
