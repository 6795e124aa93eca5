"""The text of an error for the user, and whether it is a mistake of theirs."""

from __future__ import annotations

import contextlib
import errno
from typing import TextIO

from megatron_vppo.system.slurm import job_id
from megatron_vppo.system.visible import visible

MISTAKE = 2
"""The exit status of a user's mistake; that of any other error is 1."""
DO_NOT_RESTART = 93
"""The exit status of a user's mistake in a SLURM job: the same job would fail again, so it is not to be requeued."""
STOPPED = 75
"""The exit status of a training that ended on request with its state saved (EX_TEMPFAIL): started again, it goes on."""
_BETWEEN_PROCESSES = (
    ConnectionError, TimeoutError, ChildProcessError, ProcessLookupError, BlockingIOError, InterruptedError,
)  # fmt: skip
"""The kinds of OSError that are not about a file, a disk or a setting."""
_LASTING = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG,
)  # fmt: skip
"""The numbers of an OSError that a restart of the same job meets again."""
_NATIVE_FRAMES = "\nException raised from "
"""The text with which torch begins the C++ frames of some of its messages."""


def is_mistake(error: BaseException) -> bool:
    """Returns True for errors that a user can mend: a setting, or a file or disk that cannot be read or written."""
    return isinstance(error, ValueError | OSError) and not isinstance(error, _BETWEEN_PROCESSES)


def mistake_status(error: BaseException | None = None) -> int:
    """Returns the exit status of a user's mistake here: MISTAKE, and in a SLURM job DO_NOT_RESTART.

    Args:
        error: the mistake; None: one in the command line. In a job, a restart may cure an OSError that is not about a
            file's name, its rights or a full disk, such as an error of a network file system. Its status is 1.
    """
    if job_id() is None:
        return MISTAKE
    return 1 if isinstance(error, OSError) and error.errno not in _LASTING else DO_NOT_RESTART


def error_text(error: BaseException) -> str:
    """Returns the message of an error, after its type where the message may not be one of ours."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = message_of(error).partition(_NATIVE_FRAMES)[0].strip()
    if is_mistake(error) or type(error) is RuntimeError:
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def message_of(error: BaseException) -> str:
    """Returns `str(error)`; '' for an exception that fails to make its text."""
    try:
        return str(error)
    except Exception:
        return ""


def show(text: str, stream: TextIO) -> None:
    """Prints `vppo: TEXT`; on a terminal, in place of the live line of an unfinished step."""
    erase = "\r\x1b[K" if stream.isatty() else ""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"{erase}vppo: {visible(text)}", file=stream, flush=True)
