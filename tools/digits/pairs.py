"""Pairs of scanned handwritten digits: pictures, questions, answers, and worked solutions for the cold start.

Shapes: S scans, N pairs. A scan is 8x8 grey values; a picture shows two of them, enlarged, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SCAN_SIZE = 8
ENLARGE = 7
"""8 x 7 = 56 pixels a side: four patches of 14 pixels, or two merged tokens."""
QUESTION = "<image>What is the sum?"
SOLUTIONS = (
    r"I see {a} and {b}. {a}+{b}=\boxed{{{s}}}",
    r"Left {a}, right {b}. Sum: \boxed{{{s}}}",
    r"{a} and {b}, so {a}+{b}=\boxed{{{s}}}",
    r"The digits are {a}, {b}: \boxed{{{s}}}",
)
"""Several wordings of the same reasoning, so that samples of a cold-started model differ."""


@dataclass(frozen=True)
class Scans:
    """scikit-learn's digits: 1,797 scans by 43 writers (UCI, 'Optical Recognition of Handwritten Digits')."""

    grey_S88: np.ndarray
    """uint8 [S, 8, 8]; 255 is paper, 0 full ink."""
    digit_S: np.ndarray
    """int64 [S]; what the scan shows."""


@dataclass(frozen=True)
class Pair:
    left: int
    """Index of the scan on the left."""
    right: int


def load_scans() -> Scans:
    """Every scan that scikit-learn ships, as dark ink on white paper.

    White paper, so that a blacked patch never looks like empty background.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ink_S88 = np.asarray(bunch.images)  # 0 .. 16
    return Scans(
        grey_S88=(255 - np.round(ink_S88 * 255 / 16)).astype(np.uint8), digit_S=np.asarray(bunch.target, dtype=np.int64)
    )


def split_scans(count: int, *, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the scans for training and of those held out: disjoint, together all of them.

    Args:
        count: number of scans.
        held_out: share held out, in (0, 1).
        seed: of the shuffle before the cut.
    """
    order_S = np.random.default_rng(seed).permutation(count)
    cut = round(count * held_out)
    return np.sort(order_S[cut:]), np.sort(order_S[:cut])


def draw_pairs(scans: np.ndarray, *, count: int, seed: int) -> list[Pair]:
    """`count` different pairs of two different scans, drawn evenly from `scans` (indices)."""
    possible = len(scans) * (len(scans) - 1)
    if count > possible:
        raise ValueError(f"{count} different pairs asked of {len(scans)} scans, which make only {possible}")
    rng = np.random.default_rng(seed)
    pairs: dict[Pair, None] = {}
    while len(pairs) < count:
        left, right = rng.choice(scans, size=2, replace=False)
        pairs[Pair(int(left), int(right))] = None
    return list(pairs)


def picture(scans: Scans, pair: Pair) -> Image.Image:
    """The two scans side by side, RGB, 112 pixels wide and 56 high, smoothly enlarged."""
    side = SCAN_SIZE * ENLARGE
    page = Image.new("RGB", (2 * side, side))
    for place, scan in enumerate((pair.left, pair.right)):
        small = Image.fromarray(scans.grey_S88[scan])
        page.paste(small.resize((side, side), Image.Resampling.BICUBIC).convert("RGB"), (place * side, 0))
    return page


def solution(a: int, b: int, *, wording: int) -> str:
    """A worked answer that names both digits and boxes their sum."""
    return SOLUTIONS[wording].format(a=a, b=b, s=a + b)
