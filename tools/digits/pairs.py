"""Pairs of scanned handwritten digits: images, questions, answers, and worked solutions for the cold start.

A scan is 8x8 grey values. An image shows two of them, enlarged, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SCAN_SIZE = 8
ENLARGE = 7
"""A factor: 8 x 7 = 56 pixels a side are four patches of 14 pixels, or two merged tokens."""
QUESTION = "<image>What is the sum?"
SOLUTIONS = (
    r"I see {a} and {b}. {a}+{b}=\boxed{{{s}}}",
    r"Left {a}, right {b}. Sum: \boxed{{{s}}}",
    r"{a} and {b}, so {a}+{b}=\boxed{{{s}}}",
    r"The digits are {a}, {b}: \boxed{{{s}}}",
)
"""The same reasoning in several wordings, so that the responses of a cold-started model differ."""


@dataclass(frozen=True)
class Scans:
    """scikit-learn's digits: 1,797 scans by 43 writers (UCI, 'Optical Recognition of Handwritten Digits')."""

    grey: np.ndarray
    """The grey values: uint8 [scans, 8, 8]; 255 is paper, 0 full ink."""
    digits: np.ndarray
    """The digit that each scan shows: int64 [scans]."""


@dataclass(frozen=True)
class Pair:
    """Two scans by their index."""

    left: int
    right: int


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


def draw_pairs(scans: np.ndarray, *, count: int, seed: int) -> list[Pair]:
    """Draws `count` different pairs of two different scans, evenly from `scans` (indices)."""
    possible = len(scans) * (len(scans) - 1)
    if count > possible:
        raise ValueError(f"{count} different pairs wanted, but {len(scans)} scans make only {possible}")
    rng = np.random.default_rng(seed)
    pairs: dict[Pair, None] = {}
    while len(pairs) < count:
        left, right = rng.choice(scans, size=2, replace=False)
        pairs[Pair(int(left), int(right))] = None
    return list(pairs)


def draw_image(scans: Scans, pair: Pair) -> Image.Image:
    """Draws the two scans side by side, smoothly enlarged: RGB, 112 pixels wide and 56 high."""
    side = SCAN_SIZE * ENLARGE
    page = Image.new("RGB", (2 * side, side))
    for place, scan in enumerate((pair.left, pair.right)):
        small = Image.fromarray(scans.grey[scan])
        page.paste(small.resize((side, side), Image.Resampling.BICUBIC).convert("RGB"), (place * side, 0))
    return page


def solution(a: int, b: int, *, wording: int) -> str:
    """Writes a worked solution that names both digits and boxes their sum."""
    return SOLUTIONS[wording].format(a=a, b=b, s=a + b)
