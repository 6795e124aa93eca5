"""Work that is done ahead of the one who asks for it, in a thread, and results that several ask for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Item], Made], items: Sequence[Item], *, device: torch.device) -> Iterator[Made]:
    """Yields make(item) for each item, in order. While the caller works with one, a thread makes the next.

    Args:
        device: the device that is the thread's current one, if it is a GPU: a new thread begins with the first.
    """

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, thread_name_prefix="pack", initializer=begin) as thread:
        following = thread.submit(make, items[0])
        for item in items[1:]:
            made = following.result()
            following = thread.submit(make, item)
            yield made
        yield following.result()


def read_by_all(items: Iterator[Made], *, readers: int) -> list[Iterator[Made]]:
    """Returns an iterator over all items for each reader. An item is let go when all have had it.

    `itertools.tee` holds items in blocks of 57.
    """
    if readers == 1:
        return [items]
    waiting: list[deque[Made]] = [deque() for _ in range(readers)]

    def read(own: deque[Made]) -> Iterator[Made]:
        while True:
            if not own:
                for item in items:
                    for reader in waiting:
                        reader.append(item)
                    del item
                    break
                else:
                    return
            yield own.popleft()

    return [read(own) for own in waiting]
