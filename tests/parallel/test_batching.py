"""The rows of data-parallel ranks, by hand."""

from __future__ import annotations

import pytest

from megatron_vppo.parallel.batching import num_tokens, rows_of_rank
from tests.parallel.responses import respond


@pytest.mark.parametrize(("data", "rows"), [(1, [(0, 2, 1, 3, 4, 5)]), (2, [(0, 2, 5), (1, 3, 4)])])
def test_a_rank_gets_whole_groups(data: int, rows: list[tuple[int, ...]]) -> None:
    """Groups of 9, 8, 7 and 1 tokens to read: with the first goes the last, as in test_balancing."""
    lengths, groups = (5, 8, 4, 3, 4, 1), (0, 1, 0, 2, 2, 3)
    responses = [respond([1] * n, [2], group=group) for n, group in zip(lengths, groups, strict=True)]
    assert [num_tokens(response) for response in responses] == list(lengths)
    assert [rows_of_rank(responses, data_rank=rank, data=data) for rank in range(data)] == rows


def test_a_rank_without_a_group() -> None:
    assert [rows_of_rank([respond([1], [2])], data_rank=rank, data=2) for rank in (0, 1)] == [(0,), ()]
