"""The order of prompts of several data files that are mixed by weights.

An epoch has as many prompts as all files have together. A file gets its share of them by its weight: a small file with
a large weight comes several times in it, of a large file with a small weight an epoch has a part, and the next epoch
goes on with the rest. Files alternate evenly, so that any stretch of prompts has their shares, whatever the batch.

An order follows from sizes, weights, seed and epoch alone; so a place in it is two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_CYCLE, _PASS = 0, 1
"""The kinds of random orders, in their seeds."""


def shares_of(sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the prompts of each file in an epoch: sum(sizes) by weight, rounded by largest remainders."""
    total = sum(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def mixed_order(
    sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int, shuffle: bool
) -> NDArray[np.int64]:
    """Returns the prompts of an epoch in order, numbered file after file.

    Args:
        sizes: the prompts of each file.
        weights: above zero.
        shuffle: False: each file is read from its first prompt to its last, over and over.
    """
    shares = shares_of(sizes, weights)
    begins = np.cumsum([0, *sizes])
    of_file = _alternating(shares)
    order = np.empty(len(of_file), dtype=np.int64)
    for file, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        order[of_file == file] = begins[file] + _part(size, share, (seed, file), epoch=epoch, shuffle=shuffle)
    return order


@lru_cache(maxsize=4)
def most_in_a_stretch(sizes: tuple[int, ...], weights: tuple[float, ...], k: int) -> tuple[int, ...]:
    """Counts the prompts of each file in the stretch of k prompts that has most of them."""
    of_file = _alternating(shares_of(sizes, weights))
    counts = []
    for file in range(len(sizes)):
        before = np.cumsum([0, *(of_file == file)])
        counts.append(int((before[k:] - before[:-k]).max()))
    return tuple(counts)


def _alternating(shares: Sequence[int]) -> NDArray[np.int64]:
    """Returns the file of each prompt of an epoch: the j-th prompt of one with n is due at (j + 1/2) / n."""
    due = np.concatenate([(np.arange(share) + 0.5) / max(share, 1) for share in shares])
    files = np.repeat(np.arange(len(shares)), shares)
    return files[np.argsort(due, kind="stable")]


def _part(size: int, share: int, seed: tuple[int, int], *, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Returns the prompts that an epoch takes from a file, in order. Any `size` of them in a row are different.

    Over all epochs together no prompt comes more than once more often than another: what an epoch takes beyond whole
    passes goes round in the file.
    """
    if not shuffle:
        return (epoch * share + np.arange(share)) % size

    def shuffled(*numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([*seed, *numbers]))

    passes, rest = divmod(share, size)
    circle = shuffled(_CYCLE).permutation(size)
    begin = epoch * rest % size
    draw = shuffled(_PASS, epoch)
    first, others = np.split(np.roll(circle, -begin), [rest])
    # Passes repeat one order, which begins with the rest, so that the rest can follow the last of them.
    one_pass = np.concatenate([draw.permutation(first), draw.permutation(others)])
    return np.resize(one_pass, share) if passes else one_pass[:rest]
