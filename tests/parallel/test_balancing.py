"""Rows are dealt out completely, evenly and reproducibly."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vppo.parallel.balancing import assign_to_ranks


@pytest.mark.parametrize("seed", range(40))
def test_every_row_once_with_even_counts_and_balanced_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 3000, size=int(rng.integers(0, 60))).tolist()
    num_ranks = int(rng.integers(1, 9))
    groups = assign_to_ranks(lengths, num_ranks=num_ranks)
    assert len(groups) == num_ranks
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    counts = [len(group) for group in groups]
    assert max(counts) - min(counts) <= 1
    assert all(list(group) == sorted(group) for group in groups)
    if len(lengths) % num_ranks == 0 and lengths:
        # Equal row counts: no two totals differ by more than the longest row.
        totals = [sum(lengths[row] for row in group) for group in groups]
        assert max(totals) - min(totals) <= max(lengths)


def test_small_example_by_hand() -> None:
    # 9 -> rank 0, 8 -> rank 1, 7 -> rank 1 (8 < 9), which is now full of two; 1 -> rank 0.
    assert assign_to_ranks([1, 9, 8, 7], num_ranks=2) == ((0, 1), (2, 3))
    assert assign_to_ranks([5, 5, 5], num_ranks=2) == ((0, 2), (1,))
    assert assign_to_ranks([], num_ranks=2) == ((), ())
    # One very long row does not free its rank from the second one: only one rank may take three of seven.
    assert sorted(len(group) for group in assign_to_ranks([1000] + [1] * 6, num_ranks=3)) == [2, 2, 3]


def test_balance_is_far_better_than_rows_in_order() -> None:
    lengths = sorted(np.random.default_rng(0).integers(100, 4000, size=384).tolist())
    totals = [sum(lengths[row] for row in group) for group in assign_to_ranks(lengths, num_ranks=8)]
    in_order = [sum(lengths[i : i + 48]) for i in range(0, 384, 48)]
    assert max(totals) / (sum(totals) / 8) < 1.01 < 1.7 < max(in_order) / (sum(in_order) / 8)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks is 0"):
        assign_to_ranks([1], num_ranks=0)
