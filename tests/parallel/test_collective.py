"""Agreements between ranks, over gloo."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.parallel.collective import any_rank
from tests.gloo import run_gloo


def _rank(rank: int, world: int) -> list[bool]:
    cpu = torch.device("cpu")
    return [any_rank(rank in those, device=cpu) for those in ((), (1,), (0, 1))]


@pytest.mark.distributed
def test_one_rank_speaks_for_all() -> None:
    assert run_gloo(_rank, 2) == [[False, True, True]] * 2
