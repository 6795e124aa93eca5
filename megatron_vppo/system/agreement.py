"""Agreements between all ranks: numbers that each knows, and checks that each makes for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)


def any_rank(flag: bool) -> bool:
    """Returns True on every rank if `flag` is true on some; a collective over all ranks."""
    return any(gathered(flag))


def gathered(number: Number) -> list[Number]:
    """Returns the numbers of all ranks, by rank; a collective over all ranks."""
    numbers = [number] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return numbers


def on_every_rank(work: Callable[[], Value]) -> Value:
    """Calls `work` on every rank and returns this rank's result; a collective over all ranks.

    So a rank that finds something wrong does not leave the others waiting for it. `work` itself has no collective in
    it.

    Raises:
        ValueError: `work` raised one on some rank. Every rank raises that of the first such rank.
    """
    box: list[Value] = []
    found: ValueError | None = None
    try:
        box.append(work())
    except ValueError as error:
        found = error
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, found)
    first = next((error for error in errors if error is not None), None)
    if first is None:
        return box[0]
    # The error of this rank itself, rather than the copy that was sent, knows where it was raised.
    raise found if found is not None and str(found) == str(first) else first
