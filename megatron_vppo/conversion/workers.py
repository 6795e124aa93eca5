"""The shares of one piece of work, each in a process of its own that reports its progress to the first one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from megatron_vppo.system.processes import die_with_parent

Item = TypeVar("Item")
Share = TypeVar("Share")
Result = TypeVar("Result")
OnBytes = Callable[[int], None]
"""A function that is told the number of bytes that were just done."""


def run_shares(work: Callable[[Share, OnBytes], Result], shares: Sequence[Share], *, on_bytes: OnBytes) -> list[Result]:
    """Calls `work(share, on_bytes)` for every share: in this process if there is one share, else in a process each.

    Args:
        work: a module's function. Shares, results and the errors that it raises are pickled.

    Raises:
        whatever `work` raised first, in whichever process; the other processes are ended.
        RuntimeError: a process ended without a result or an error.
    """
    if len(shares) == 1:
        return [work(shares[0], on_bytes)]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in shares]
    processes = [
        context.Process(target=_run_share, args=(os.getpid(), work, share, sender), daemon=True)
        for share, (_, sender) in zip(shares, pipes, strict=True)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        return _collect([receiver for receiver, _ in pipes], on_bytes)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            if process.pid is not None:
                process.join()


def _collect(receivers: list[Connection], on_bytes: OnBytes) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        for ready in wait([receiver for number, receiver in enumerate(receivers) if number not in results]):
            number = next(n for n, receiver in enumerate(receivers) if receiver is ready)
            try:
                what, value = receivers[number].recv()
            except EOFError:
                raise RuntimeError(f"process {number} of the conversion was ended from outside") from None
            if what == "bytes":
                on_bytes(value)
            elif what == "failed":
                raise value
            else:
                results[number] = value
    return [results[number] for number in range(len(receivers))]


def _run_share(parent: int, work: Callable[[Any, OnBytes], Any], share: Any, sender: Connection) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    torch.set_num_threads(1)
    try:
        result = work(share, lambda num_bytes: sender.send(("bytes", num_bytes)))
        sender.send(("done", result))
    except (ValueError, OSError) as error:  # their text says what is wrong, without a traceback
        sender.send(("failed", error))
    except BaseException:
        sender.send(("failed", RuntimeError(traceback.format_exc())))


def split_evenly(items: Sequence[Item], *, shares: int, size: Callable[[Item], int]) -> list[list[Item]]:
    """Divides the items into runs of neighbours of about equal size: at most `shares` runs, none of them empty.

    An item goes to the run that its middle lies in, on a scale from 0 to the sum of all sizes.
    """
    total = sum(size(item) for item in items)
    runs: list[list[Item]] = [[] for _ in range(shares)]
    done = 0
    for item in items:
        middle = done + size(item) // 2
        runs[min(shares - 1, middle * shares // max(total, 1))].append(item)
        done += size(item)
    return [run for run in runs if run]
