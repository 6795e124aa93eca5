"""Scans of handwritten digits, 8x8 grey values each, and images that show several of them, enlarged, in a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SCAN_SIZE = 8
ENLARGE = 7
"""A factor: 8 x 7 = 56 pixels a side are four patches of 14 pixels, or two merged tokens."""


@dataclass(frozen=True)
class Scans:
    """scikit-learn's digits: 1,797 scans by 43 writers (UCI, 'Optical Recognition of Handwritten Digits')."""

    grey: np.ndarray
    """The grey values: uint8 [scans, 8, 8]; 255 is paper, 0 full ink."""
    digits: np.ndarray
    """The digit that each scan shows: int64 [scans]."""


def load_scans() -> Scans:
    """Loads every scan that scikit-learn ships, as dark ink on white paper.

    The paper is white so that a blacked patch never looks like empty background.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ink = np.asarray(bunch.images)  # 0 .. 16
    return Scans(
        grey=(255 - np.round(ink * 255 / 16)).astype(np.uint8), digits=np.asarray(bunch.target, dtype=np.int64)
    )


def split_scans(count: int, *, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the scans into those for training and those held out, and returns the indices of both.

    Args:
        count: the number of scans.
        held_out: the share held out, in (0, 1).
        seed: the seed of the shuffle before the cut.
    """
    order = np.random.default_rng(seed).permutation(count)
    cut = round(count * held_out)
    return np.sort(order[cut:]), np.sort(order[:cut])


def draw_scans(scans: Sequence[int] | np.ndarray, *, each: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Draws `count` different choices of `each` different scans in order, evenly from `scans` (indices)."""
    possible = math.perm(len(scans), each)
    if count > possible:
        raise ValueError(f"{count} different choices of {each} wanted, but {len(scans)} scans make only {possible}")
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(int(scan) for scan in rng.choice(scans, size=each, replace=False))] = None
    return list(drawn)


def draw_image(scans: Scans, chosen: Sequence[int], *, columns: int) -> Image.Image:
    """Draws the chosen scans row by row, smoothly enlarged: RGB, 56 pixels for each side of a scan."""
    side = SCAN_SIZE * ENLARGE
    page = Image.new("RGB", (columns * side, len(chosen) // columns * side))
    for place, scan in enumerate(chosen):
        small = Image.fromarray(scans.grey[scan])
        row, column = divmod(place, columns)
        large = small.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
        page.paste(large, (column * side, row * side))
    return page
