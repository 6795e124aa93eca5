"""Reading and writing at the same time.

A conversion reads as many bytes as it writes, and each of them costs a copy out of the page cache and one into it. One
after the other they leave the disk idle while they copy, and a core idle throughout.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END: object = object()


def read_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items in the same order; the next one is made in a thread while one is worked on.

    The thread ends with the last item, or when this is closed, once the item that it is making is made.

    Raises:
        whatever making an item raises, where that item is asked for.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming: Future[Item] = thread.submit(next, items, _END)  # type: ignore[arg-type]
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)  # type: ignore[arg-type]
            yield item
