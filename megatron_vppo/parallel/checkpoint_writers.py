"""The processes by which Megatron writes a checkpoint (0.16 to 0.19), and what happens to the rank that waits for them.

A rank forks a writer per file. The writers report through a queue, whose server is one more process.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vppo.system.processes import children_of, die_with_parent
from megatron_vppo.system.watchdog import Hangs

LOOK_SECONDS = 0.5
"""The time between two looks at the writers."""


class WriterLost(Hangs):
    """The error of a rank whose writer was ended by a signal: Megatron waits for its report for ever."""


def use_result_queue_of_ours() -> None:
    """Gives the writers a queue whose server ends with this rank and leaves no file behind.

    Megatron's own server outlives a rank that is killed, and its socket lies in a folder of its own in /tmp.

    Raises:
        RuntimeError: the server ended while it started.
    """
    if getattr(filesystem_async, "_results_queue", None) is None:
        address = f"\0vppo-checkpoint-{os.getpid()}-{secrets.token_hex(8)}"  # Linux's abstract names are no files
        manager = SyncManager(address=address, ctx=multiprocessing.get_context("spawn"))
        try:
            manager.start(die_with_parent, (os.getpid(),))
            filesystem_async._results_queue = manager.Queue()
        except (ConnectionError, EOFError) as error:
            raise RuntimeError("the process that the writers of a checkpoint report to ended while starting") from error


@contextmanager
def noticing_lost_writers(target: Path) -> Iterator[None]:
    """Watches the processes that the block starts. A thread raises WriterLost if a signal ends one of them.

    The block itself may hang then; `threading.excepthook` is what ends the process.

    Raises:
        RuntimeError: the server of the queue has ended.
    """
    before, done = set(children_of(os.getpid())), threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            for pid in set(children_of(os.getpid())) - before:
                name = killed_by_signal(pid)
                if name is not None and not done.is_set():
                    raise WriterLost(
                        f"{target} was not written: its process {pid} ended with signal {name}; SIGKILL often means "
                        "that the host ran out of memory"
                    )

    thread = threading.Thread(target=look, name="checkpoint writers", daemon=True)
    thread.start()
    try:
        with naming_lost_queue(target):
            yield
    finally:
        done.set()
        thread.join()


@contextmanager
def naming_lost_queue(target: Path) -> Iterator[None]:
    """Says that the server of the queue has ended, by a RuntimeError with the checkpoint that was not written."""
    try:
        yield
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"{target} was not written: the process that its writers report to has ended") from error


def killed_by_signal(pid: int) -> str | None:
    """Returns the name of the signal that ended a child which nobody has waited for yet; None if none did."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # it has been waited for
        return None
    if ended is None or ended.si_code not in (os.CLD_KILLED, os.CLD_DUMPED):
        return None
    return signal.Signals(ended.si_status).name
