"""The same work on several parts, in as many processes, with its progress reported to the first one."""

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

Part = TypeVar("Part")
Result = TypeVar("Result")
Report = Callable[[int], None]
"""Takes a number of bytes that were just done."""


def run_parts(work: Callable[[Part, Report], Result], parts: Sequence[Part], *, on_bytes: Report) -> list[Result]:
    """work(part, report) for each part: one part in this process, several in a process each.

    Args:
        work: a function of a module; parts, results and the errors it raises are pickled.

    Raises:
        whatever `work` raised first, in whichever process; the other processes are ended.
        RuntimeError: a process ended without a word.
    """
    if len(parts) == 1:
        return [work(parts[0], on_bytes)]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in parts]
    processes = [
        context.Process(target=_run_part, args=(os.getpid(), work, part, sender), daemon=True)
        for part, (_, sender) in zip(parts, pipes, strict=True)
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


def _collect(receivers: list[Connection], on_bytes: Report) -> list[Any]:
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


def _run_part(parent: int, work: Callable[[Any, Report], Any], part: Any, sender: Connection) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    torch.set_num_threads(1)
    try:
        result = work(part, lambda num_bytes: sender.send(("bytes", num_bytes)))
        sender.send(("done", result))
    except (ValueError, OSError) as error:  # say what is wrong by themselves
        sender.send(("failed", error))
    except BaseException:
        sender.send(("failed", RuntimeError(traceback.format_exc())))


def split_evenly(items: Sequence[Part], *, parts: int, size: Callable[[Part], int]) -> list[list[Part]]:
    """Runs of neighbours of about equal size, at most `parts` of them, none empty."""
    total = sum(size(item) for item in items)
    runs: list[list[Part]] = [[] for _ in range(parts)]
    done = 0
    for item in items:
        runs[min(parts - 1, (done + size(item) // 2) * parts // max(total, 1))].append(item)
        done += size(item)
    return [run for run in runs if run]
