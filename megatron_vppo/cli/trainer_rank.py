"""One trainer rank: its standard error goes to a file of its own, and the first rank to fail says so to the user.

A rank that our launcher has started leaves that to the launcher, which also knows of ranks that were killed. Under the
user's own torchrun, or srun, the ranks settle it by a file in the folder of the logs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from megatron_vppo.cli.errors import show
from megatron_vppo.cli.output import READER_LEFT, reader_left
from megatron_vppo.cli.rank_error import RankError, describe, rank_log, write_error

LAUNCHER_VARIABLE = "VPPO_LAUNCHER_PID"
"""The environment variable by which a rank knows that our launcher has started it."""
_CLAIM = ".first_error"
_STARTED = time.time()


def run_rank(work: Callable[[], None], *, logs: Path) -> int:
    """Calls `work` with standard error going to the rank's log, and returns 0.

    If it fails, the traceback goes to the log, the error is reported, and this process ends at once with the error's
    status: a normal exit can wait for ranks that wait for this one. A reader of standard output that has left is no
    error, and not reported; the status is READER_LEFT.
    """
    rank = int(os.environ["RANK"])
    log = rank_log(logs, rank)
    try:
        terminal = _send_stderr_to(log)
    except OSError as error:  # its message says all
        _fail(describe(error, rank=rank, log=None), logs, sys.stderr)
    try:
        _call(work, logs, terminal)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and reader_left(sys.stdout):
            os._exit(READER_LEFT)
        with contextlib.suppress(OSError):  # the log's disk is full
            traceback.print_exc()
        _fail(describe(error, rank=rank, log=log), logs, terminal)
    return 0


def is_launched_by_us() -> bool:
    """Returns True if our launcher has started this rank."""
    return os.environ.get(LAUNCHER_VARIABLE) == str(os.getppid())


def _call(work: Callable[[], None], logs: Path, terminal: TextIO) -> None:
    """Calls `work`. If a check that one rank makes for all has failed, that rank tells the user, and all end."""
    from megatron_vppo.system.rendezvous import Refused  # it imports torch

    try:
        work()
    except Refused as refusal:
        status = refusal.status
        if refusal.error is not None:
            with contextlib.suppress(OSError):
                traceback.print_exception(refusal.error)
            error = describe(refusal.error, rank=int(os.environ["RANK"]), log=rank_log(logs, int(os.environ["RANK"])))
            _report(error, logs, terminal)
            status = error.status
        assert status is not None, "rank 0 has an error, and the others its status"
        refusal.leave(status)
        os._exit(status)


def _fail(error: RankError, logs: Path, terminal: TextIO) -> NoReturn:
    _report(error, logs, terminal)
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


def _report(error: RankError, logs: Path, terminal: TextIO) -> None:
    """Tells the launcher; where there is none of ours, tells the user, if no other rank has done so."""
    written = write_error(error)
    if written and is_launched_by_us():
        return
    if _is_first(logs / _CLAIM):
        show(error.text(), terminal)


def _is_first(claim: Path) -> bool:
    """Returns True on the first rank of this attempt that asks, and on all of them if the file cannot be written.

    The file holds the time of the last claim. One from before this process is that of an earlier attempt.
    """
    try:
        with open(claim, "a+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if float(file.read() or 0) >= _STARTED:
                return False
            file.truncate(0)
            file.write(repr(time.time()))
    except (OSError, ValueError):
        pass
    return True
