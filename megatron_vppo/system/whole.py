"""A folder that appears under its name when it is whole, and not before."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

RESERVE_BYTES = 64 << 20
"""For descriptions, tokenizer files and the file system's own."""


@contextmanager
def unfinished_folder(target: Path, *, num_bytes: int) -> Iterator[Path]:
    """A new folder `.NAME.tmp` beside the target, which is flushed to disk and renamed at the end.

    It is removed on every error, on Ctrl-C and on SIGTERM. Where the process is killed it stays, and the next
    conversion to the same target removes it.

    Args:
        num_bytes: that will be written.

    Raises:
        ValueError: the target exists, cannot be made or is being written by another process, or the disk is too small
            or becomes full.
    """
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or give another name")
    parent = target.absolute().parent
    unfinished = parent / f".{target.name}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(unfinished, target)
    except OSError as error:  # a file where a folder should be, no permission, a disk that is read only
        raise ValueError(f"{target} cannot be made: {error.strerror}: {error.filename}") from error
    try:
        _check_space(target, num_bytes=num_bytes)
        with _exit_on_sigterm():
            yield unfinished
            _flush(unfinished)
            os.rename(unfinished, target)
            _flush_entry(parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise no_space(target, num_bytes=num_bytes, reason=os.strerror(error.errno)) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def no_space(target: Path, *, num_bytes: int, reason: str) -> ValueError:
    parent = target.absolute().parent
    return ValueError(
        f"{target}: {reason}. About {(num_bytes + RESERVE_BYTES) / 1e9:.2f} GB are needed in {parent}, "
        f"{shutil.disk_usage(parent).free / 1e9:.2f} GB are free there"
    )


def _claim(unfinished: Path, target: Path) -> int:
    """Makes the folder and locks it. What a killed process left has no lock any more."""
    unfinished.mkdir(exist_ok=True)
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another process is writing {target}") from None
    for left in unfinished.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return lock


def _check_space(target: Path, *, num_bytes: int) -> None:
    if shutil.disk_usage(target.absolute().parent).free < num_bytes + RESERVE_BYTES:
        raise no_space(target, num_bytes=num_bytes, reason="not enough space")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """So that SIGTERM unwinds the stack as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _flush(folder: Path) -> None:
    """Everything in it is on the disk when this returns: a name that survives a power cut stands for whole files."""
    for base, _, files in os.walk(folder):
        for file in files:
            _flush_entry(Path(base) / file)
        _flush_entry(Path(base))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
