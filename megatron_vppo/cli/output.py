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


def flush_output() -> None:
    """Flushes stdout while a failure can still be caught. Python's own flush at exit could only print it."""
    if sys.stdout is not None:  # None: started with stdout closed
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
