"""A function of every row of a data set, in several processes where there are enough rows."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from megatron_vppo.system.processes import die_with_parent

Outcome = TypeVar("Outcome")


def of_rows(
    read_row: Callable[..., Outcome], arguments: tuple[Any, ...], *, rows: int, workers: int, rows_per_chunk: int
) -> Iterator[Outcome]:
    """Yields read_row(*arguments, row) of each row, in order.

    Args:
        read_row: a function of a module, which another process can import.
        arguments: picklable.
        workers: processes; with fewer than two the rows are read in this one.
        rows_per_chunk: the rows that a process takes at a time.
    """
    if workers < 2:
        yield from (read_row(*arguments, row) for row in range(rows))
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy threads and process groups of the trainer
        initializer=_start_worker,
        initargs=(os.getpid(), read_row, arguments),
    )
    try:
        yield from pool.map(_read_here, range(rows), chunksize=rows_per_chunk)
    finally:
        pool.shutdown(cancel_futures=True)


_job: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


def _start_worker(parent_pid: int, read_row: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _job
    die_with_parent(parent_pid)
    _job = (read_row, arguments)


def _read_here(row: int) -> Any:
    assert _job is not None
    read_row, arguments = _job
    return read_row(*arguments, row)
