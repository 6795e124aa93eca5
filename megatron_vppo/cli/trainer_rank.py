"""One trainer rank: its standard error goes to a file of its own, and the first rank to fail says so to the user.

A rank that our launcher has started leaves that to the launcher, which also knows of ranks that were killed. Under the
user's own torchrun, or srun, the ranks settle it by a file in the folder of the logs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import logging
import os
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from megatron_vppo.cli.errors import DO_NOT_RESTART, STOPPED, show
from megatron_vppo.cli.output import READER_LEFT, flush_output, reader_left
from megatron_vppo.cli.rank_error import RankError, describe, rank_log, write_error
from megatron_vppo.cli.silent_ranks import explain_silence, mark_reported
from megatron_vppo.system.attempt import link_latest
from megatron_vppo.system.flight_recorder import record_collectives
from megatron_vppo.system.requeue import do_not_requeue
from megatron_vppo.system.stop_signals import ignore_stop_signals
from megatron_vppo.system.watchdog import Hangs

LAUNCHER_VARIABLE = "VPPO_LAUNCHER_PID"
"""The environment variable by which a rank knows that our launcher has started it."""
_CLAIM = ".first_error"
_STARTED = time.time()
_FOLLOWS = "follows"
CAUSE_SECONDS = 2.0
"""The time that a rank which lost contact leaves to the rank that knows why."""


def run_rank(work: Callable[[], int], *, logs: Path) -> int:
    """Calls `work` with standard error going to the rank's log, and returns its exit status.

    If it fails, the traceback goes to the log, the error is reported, and this process ends at once with the error's
    status: a normal exit can wait for ranks that wait for this one. A reader of standard output that has left is no
    error, and not reported; the status is READER_LEFT.

    Args:
        logs: the folder of this attempt's logs.
    """
    rank = int(os.environ["RANK"])
    log = rank_log(logs, rank)
    try:
        terminal = _send_stderr_to(log)
    except OSError as error:  # its message says all
        _fail(describe(error, rank=rank, log=None), logs, sys.stderr)
    if rank == 0:
        link_latest(logs.parent, logs.name)
    record_collectives(logs.absolute())
    _end_if_main_thread_hangs(rank, log, terminal)
    try:
        status = _call(work, logs, terminal)
        if status == STOPPED:  # all ranks at once: how long Python takes to end differs from rank to rank by seconds
            flush_output()
            os._exit(status)
        return status
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and reader_left(sys.stdout):
            os._exit(READER_LEFT)
        with contextlib.suppress(OSError):  # the log's disk is full
            traceback.print_exc()
        _fail(describe(error, rank=rank, log=log), logs, terminal)


def _end_if_main_thread_hangs(rank: int, log: Path, terminal: TextIO) -> None:
    """Lets this process end with the error of a thread which finds that the main thread hangs."""
    others = threading.excepthook

    def end(arguments: threading.ExceptHookArgs) -> None:
        if isinstance(arguments.exc_value, Hangs):
            _fail(describe(arguments.exc_value, rank=rank, log=log), log.parent, terminal)
        others(arguments)

    threading.excepthook = end


def is_launched_by_us() -> bool:
    """Returns True if our launcher has started this rank."""
    return os.environ.get(LAUNCHER_VARIABLE) == str(os.getppid())


def _call(work: Callable[[], int], logs: Path, terminal: TextIO) -> int:
    """Calls `work`. If a check that one rank makes for all has failed, that rank tells the user, and all end."""
    from megatron_vppo.system.rendezvous import Refused  # it imports torch

    try:
        return work()
    except Refused as refusal:
        status = refusal.status
        if refusal.error is not None:
            with contextlib.suppress(OSError):
                traceback.print_exception(refusal.error)
            error = describe(refusal.error, rank=int(os.environ["RANK"]), log=rank_log(logs, int(os.environ["RANK"])))
            _tell(error, logs, terminal)
            status = error.status
        assert status is not None, "rank 0 has an error, and the others its status"
        refusal.leave(status)
        os._exit(status)


def _fail(error: RankError, logs: Path, terminal: TextIO) -> NoReturn:
    _tell(error, logs, terminal)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(error.status)


def _send_stderr_to(log: Path) -> TextIO:
    """Lets everything that this process and its children write to standard error go to the end of a file, text of C++
    libraries and the stack of a crash included.

    Warnings of ours are for the user and stay where they were.

    Returns:
        What was standard error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    sys.stderr.flush()
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()
    logging.getLogger("megatron_vppo").addHandler(logging.StreamHandler(terminal))
    print(
        f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}: an attempt begins: vppo {shlex.join(sys.argv[1:])} "
        f"(rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, process {os.getpid()} on {socket.gethostname()})",
        file=sys.stderr,
        flush=True,
    )
    return terminal


def _tell(error: RankError, logs: Path, terminal: TextIO) -> None:
    """Tells the batch script, if a restart would not help, and the user."""
    if error.status == DO_NOT_RESTART:
        do_not_requeue(logs.parent.parent, error.message)
    _report(error, logs, terminal)


def _report(error: RankError, logs: Path, terminal: TextIO) -> None:
    """Tells the launcher; where there is none of ours, tells the user, if no other rank has done so.

    A rank that lost contact is not the cause. It lets others speak first, and then says which ranks were silent.
    """
    written = write_error(error)
    if written and is_launched_by_us():
        return
    mark_reported(logs, error.rank)
    if error.lost_contact:
        ignore_stop_signals()  # SIGTERM is srun's, when another rank was killed
        time.sleep(CAUSE_SECONDS)
    if not _is_first(logs / _CLAIM, follows=error.lost_contact):
        return
    silence = explain_silence(logs, world_size=int(os.environ["WORLD_SIZE"])) if error.lost_contact else None
    if silence is not None:
        error = dataclasses.replace(error, message=f"{silence}; {error.message}")
    show(error.text(), terminal)


def _is_first(claim: Path, *, follows: bool) -> bool:
    """Returns True on the first rank of this attempt that asks, and on all of them if the file cannot be written.

    Also on the first whose error does not follow from another's, where those before did. The file holds the time of the
    last claim, and whether its error followed. One from before this process is that of an earlier attempt.
    """
    try:
        with open(claim, "a+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before, _, kind = file.read().partition(" ")
            if float(before or 0) >= _STARTED and (follows or kind != _FOLLOWS):
                return False
            file.truncate(0)
            file.write(f"{time.time()!r} {_FOLLOWS if follows else ''}")
    except (OSError, ValueError):
        pass
    return True
