"""DAPO's soft punishment of long responses (arXiv 2503.14476, Eq. 13)."""

from __future__ import annotations


def overlong_reward(length: int, *, most: int, buffer: int) -> float:
    """Returns what a response's length adds to its reward: 0 down to -1, linearly over the last `buffer` tokens.

    Args:
        length: tokens of the response.
        most: the largest length, at which it is -1 (L_max).
        buffer: at least 1 (L_cache).
    """
    return min(0.0, max(-1.0, (most - buffer - length) / buffer))
