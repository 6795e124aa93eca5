"""Reading and writing at the same time.

A conversion reads as many bytes as it writes, and each byte costs a copy out of the page cache and one into it. If the
two took turns, the disk would be idle during the copies and a core would be idle throughout.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

PIECE_BYTES = 16 << 20
"""The bytes of the rows that are gathered in memory at a time, while as many are being read. glibc keeps and reuses
blocks of up to 32 MiB. Larger ones it takes from the kernel each time, page by page, which costs as much as copying
them."""

Item = TypeVar("Item")
_END: object = object()


def read_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yields the same items in the same order; a thread makes the next one while the caller works on one.

    The thread ends after the last item. If this generator is closed earlier, the thread ends with the item at hand.

    Raises:
        whatever making an item raises, where that item is asked for.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming: Future[Item] = thread.submit(next, items, _END)  # type: ignore[arg-type]
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)  # type: ignore[arg-type]
            yield item
