"""The measured all-reduce, over gloo, and its figures by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.parallel.all_reduce_speed import CPU_BYTES, AllReduceSpeed, measure_all_reduce
from tests.gloo import run_gloo


def test_bandwidth_as_nccl_tests_count_it() -> None:
    speed = AllReduceSpeed(ranks=4, num_bytes=64 << 20, seconds=0.01)
    assert speed.bus_bytes_per_second == pytest.approx(2 * 3 / 4 * 67108864 / 0.01, rel=1e-12)
    assert speed.text() == "all-reduce of 64 MiB over 4 ranks: 10.0 ms, 10.07 GB/s"


def _measure(rank: int, world_size: int) -> AllReduceSpeed:
    return measure_all_reduce(torch.device("cpu"))


@pytest.mark.distributed
def test_it_measures_over_all_ranks() -> None:
    for speed in run_gloo(_measure, 2):
        assert (speed.ranks, speed.num_bytes) == (2, CPU_BYTES)
        assert 0 < speed.seconds < 60
