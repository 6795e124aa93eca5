"""Types of command-line arguments: each turns a text into a value, or tells argparse what is wrong with it."""

from __future__ import annotations

import argparse
import math

from megatron_vppo.config.ranges import LARGEST_INT


def positive(text: str) -> int:
    """Reads a whole number of at least 1, and at most LARGEST_INT, as settings have them."""
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST_INT:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1 and at most {LARGEST_INT}")
    return int(text)


def gibibytes(text: str) -> int:
    """Reads a size in GiB, decimals allowed, as a number of bytes."""
    try:
        size = float(text) * 2**30
    except ValueError:
        size = math.nan
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of GiB")
    return int(size)


def gpu_counts(text: str) -> tuple[int, ...]:
    """Reads whole numbers of at least 1 with commas between them."""
    return tuple(positive(number.strip()) for number in text.split(","))
