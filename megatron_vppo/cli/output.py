"""Lines for the terminal, and standard output that cannot be written: its reader has left, or its disk is full."""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import TextIO

from megatron_vppo.system.visible import visible

READER_LEFT = 128 + signal.SIGPIPE
"""The exit status when nobody reads the output any more: what a shell reports for a program that SIGPIPE ended."""


def say(text: str) -> None:
    """Prints a line, or several, at once. Characters that a terminal would obey are shown as symbols."""
    print(visible(text), flush=True)


def open_closed_streams() -> None:
    """Opens /dev/null in place of the standard streams that this process was started without.

    The next files to be opened would get their numbers, and with them what is meant for the terminal.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is that of the stream
            os.set_inheritable(nowhere, True)
            setattr(sys, name, open(nowhere, mode, encoding="utf-8"))  # noqa: SIM115  (stays open)


def flush_output() -> None:
    """Flushes stdout while a failure can still be caught. Python's own flush at exit could only print it."""
    sys.stdout.flush()


def output_is_full() -> bool:
    """Returns True if stdout cannot write what is still in its buffer, for another reason than a reader that left."""
    try:
        flush_output()
    except BrokenPipeError:
        return False
    except OSError:
        return True
    return False


def reader_left(stream: TextIO | None) -> bool:
    """Returns True if the stream is a pipe that is no longer open for reading; poll() reports that as an error."""
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard(stream: TextIO) -> None:
    """Sends the rest of a stream to /dev/null, what is still in its buffer too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
