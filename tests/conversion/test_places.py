"""Rows of a parameter and rows of the tensors that it is stacked from, against a list of all rows."""

from __future__ import annotations

import pytest

from megatron_vppo.conversion.places import StoredBlock, rows_by_tensor

HEIGHTS = (3, 0, 1, 4)


@pytest.mark.parametrize("low", range(9))
@pytest.mark.parametrize("high", range(9))
def test_rows_of_stacked_tensors(low: int, high: int) -> None:
    every_row = [(number, row) for number, height in enumerate(HEIGHTS) for row in range(height)]
    found = list(rows_by_tensor(low, high, HEIGHTS))
    assert [(number, row) for number, begin, end in found for row in range(begin, end)] == every_row[low:high]
    assert all(begin < end for _, begin, end in found)


def test_region_of_a_block_of_a_stacked_layer() -> None:
    """Rows 100 to 200 of a parameter, the second half of the third layer's [200, 8]."""
    block = StoredBlock(key="up", size=(5, 100, 8), offset=(2, 0, 0), row=100, rows=100, stacked=1)
    assert block.region(100, block.end) == ((2, 0, 0), (1, 100, 8))
    assert block.region(130, 131) == ((2, 30, 0), (1, 1, 8))
