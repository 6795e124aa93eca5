"""The groups that are worth training on."""

from __future__ import annotations

import pytest

from megatron_vppo.algorithm.grouping import keep_group


def test_keep_group_bounds_are_strict() -> None:
    assert [keep_group([1.0] * c + [0.0] * (8 - c), low=0.01, high=0.99) for c in (0, 1, 7, 8)] == [
        False,
        True,
        True,
        False,
    ]
    assert not keep_group([0.5, 0.5], low=0.5, high=0.99)
    assert not keep_group([0.5, 0.5], low=0.01, high=0.5)
    with pytest.raises(ValueError, match="without responses"):
        keep_group([], low=0.01, high=0.99)
