"""The order of mixed files: shares by weight, everywhere and worked out by hand; no prompt twice too early."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_vppo.data.mixture import mixed_order, most_in_a_stretch, shares_of

SIZES, WEIGHTS = (30, 7, 63), (1.0, 3.0, 6.0)
SHARES = (10, 30, 60)
"""100 prompts by tenths."""


def files(order: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(SIZES), order, side="right")


def test_shares_by_hand() -> None:
    assert shares_of(SIZES, WEIGHTS) == SHARES
    assert shares_of((4, 4), (1.0, 2.0)) == (3, 5), "2.67 and 5.33: the larger remainder is rounded up"
    assert shares_of((1, 1, 1), (0.1, 0.1, 0.1)) == (1, 1, 1)
    assert shares_of((5, 5), (1.0, 1e-9)) == (10, 0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_stretch_has_its_shares(shuffle: bool) -> None:
    for epoch in range(3):
        of_file = files(mixed_order(SIZES, WEIGHTS, seed=4, epoch=epoch, shuffle=shuffle))
        for length in (1, 10, 37, 100):
            for start in range(0, 101 - length):
                counts = np.bincount(of_file[start : start + length], minlength=3)
                assert np.abs(counts - length * np.array(SHARES) / 100).max() < 2
        assert tuple(np.bincount(of_file)) == SHARES


def test_the_even_order_by_hand() -> None:
    """Two files of four prompts, weights 1 to 3: two and six prompts, due at 1/4, 3/4 and at 1/12, 3/12, ... 11/12."""
    assert mixed_order((4, 4), (1.0, 3.0), seed=0, epoch=0, shuffle=False).tolist() == [4, 0, 5, 6, 7, 1, 4, 5]
    assert mixed_order((4, 4), (1.0, 3.0), seed=0, epoch=1, shuffle=False).tolist() == [6, 2, 7, 4, 5, 3, 6, 7]
    assert most_in_a_stretch((4, 4), (1.0, 3.0), 3) == (1, 3)


def test_prompts_of_a_file_come_equally_often_and_never_soon_again() -> None:
    """An epoch has 10 of 30 prompts, 30 of 7 and 60 of 63; so 21 epochs have each 7, 90 and 20 times."""
    orders = [mixed_order(SIZES, WEIGHTS, seed=4, epoch=epoch, shuffle=True) for epoch in range(21)]
    for file, (size, share) in enumerate(zip(SIZES, SHARES, strict=True)):
        drawn = np.concatenate([order[files(order) == file] for order in orders])
        counts = Counter(drawn.tolist())
        assert len(counts) == size
        assert set(counts.values()) == {21 * share // size}
        for epochs in range(1, 21):
            some = Counter(drawn[: epochs * share].tolist())
            assert max(some.values()) - min(some.get(prompt, 0) for prompt in counts) <= 1
        for order in orders:
            of_epoch = order[files(order) == file]
            for start in range(len(of_epoch)):
                stretch = of_epoch[start : start + size]
                assert len(set(stretch.tolist())) == len(stretch)


def test_seed_and_epoch_choose_the_order() -> None:
    orders = [mixed_order(SIZES, WEIGHTS, seed=s, epoch=e, shuffle=True) for s, e in ((4, 0), (4, 1), (5, 0))]
    again = mixed_order(SIZES, WEIGHTS, seed=4, epoch=0, shuffle=True)
    assert orders[0].tolist() == again.tolist()
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_fullest_stretch_is_counted() -> None:
    of_file = files(mixed_order(SIZES, WEIGHTS, seed=1, epoch=0, shuffle=False))
    for k in (1, 9, 40, 100):
        windows = [np.bincount(of_file[n : n + k], minlength=3) for n in range(101 - k)]
        assert most_in_a_stretch(SIZES, WEIGHTS, k) == tuple(np.max(windows, axis=0))
