"""Files and folders that appear under their name when they are whole, and not before.

Everything is written under a temporary name in the same folder, flushed to disk and then renamed:

    target/            what was there before, untouched until the end
    .target.tmp/       what is being written
    .target.old.tmp/   what was there before, for the moment between two renames

So whoever finds `target` finds all of it, also after a power cut. A process that is killed while it writes a folder
leaves `.target.tmp`, which the next one that writes the same target removes. A file's temporary name has the number of
its process in it, so that several may write at once; one that is left by a killed process stays.
"""

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
from typing import BinaryIO

RESERVE_BYTES = 64 << 20
"""Room for descriptions, tokenizer files and the file system itself, next to the weights."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write that takes the place of `path` when the block ends without an exception.

    Several processes may write the same path; the last one to finish wins.

    Raises OSError, with the path, if the file cannot be made or put in place, or the disk becomes full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and (
            error.filename == str(temporary) or (error.errno in _FULL and error.filename is None)
        ):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _flush_entry(path.parent)


def write_new_text(path: Path, text: str, *, option: str) -> None:
    """Writes a new file whole; one that is there and says the same stays as it is.

    Args:
        option: the option of the command line that names the file, for messages.

    Raises:
        ValueError: there is another one, which somebody may have edited, or no folder for it.
    """
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        raise ValueError(
            f"{path} is there already and says something else, which you may have written; remove it, or set {option}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it, or set another {option}")
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Gives an OSError of the block the name of its file, which one of a write lacks."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def whole_folder(target: Path, *, replace: bool = False, num_bytes: int | None = None) -> Iterator[Path]:
    """Makes a folder to fill that becomes `target` when the block ends without an exception.

    It is removed on every exception, Ctrl-C included; see `exit_on_sigterm` for SIGTERM. Where several processes fill
    it together, one of them enters this block. The others write into `unfinished_folder(target)`, after the one has
    entered and before it leaves.

    Args:
        replace: True if an older target may be there; it stays until the new one is whole.
        num_bytes: the number of bytes that will be written, to check the free space for; None: unknown.

    Raises:
        ValueError: the target exists and is not to be replaced, cannot be made, or is being written by another
            process; or the disk is too small or becomes full.
    """
    if not replace and target.exists():
        raise ValueError(f"{target} exists; remove it, or give another name")
    unfinished = unfinished_folder(target)
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(unfinished, target)
    except OSError as error:  # a file where a folder should be, no permission, a disk that is read only
        raise ValueError(f"{target} cannot be made: {error.strerror}: {error.filename}") from error
    try:
        if num_bytes is not None:
            _check_space(target, num_bytes=num_bytes)
        yield unfinished
        _flush(unfinished)
        _put_in_place(unfinished, target)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _no_space(target, num_bytes=num_bytes, reason=os.strerror(error.errno)) from error
        raise
    finally:
        os.close(lock)


def unfinished_folder(target: Path) -> Path:
    """Returns the folder that `whole_folder` fills."""
    return target.absolute().with_name(f".{target.name}.tmp")


def remove_folder(path: Path) -> None:
    """Removes a folder. It is renamed first, so that its name never shows a folder of which a part is gone."""
    _remove(_set_aside(path))


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM unwind the stack within the block as Ctrl-C does, so that unfinished files are removed.

    This is for a process on its own. A rank that waits for others in a collective would not end: Python runs a handler
    only when the call into the library returns. In another thread than the main one, which cannot set a handler, it
    does nothing.
    """
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


def _claim(unfinished: Path, target: Path) -> int:
    """Makes the folder, empties it and locks it; returns the lock. A process that was killed holds no lock any more."""
    unfinished.mkdir(exist_ok=True)
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another process is writing {target}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some network file systems have no locks; two writers are then not kept apart
            os.close(lock)
            raise
    for left in unfinished.iterdir():
        _remove(left)
    return lock


def _put_in_place(unfinished: Path, target: Path) -> None:
    old = _set_aside(target) if target.exists() else None
    try:
        os.rename(unfinished, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    _flush_entry(unfinished.parent)
    if old is not None:
        _remove(old)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f".{path.name}.old.tmp")
    _remove(aside)
    os.rename(path, aside)
    return aside


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_space(target: Path, *, num_bytes: int) -> None:
    if shutil.disk_usage(target.absolute().parent).free < num_bytes + RESERVE_BYTES:
        raise _no_space(target, num_bytes=num_bytes, reason="not enough space")


def _no_space(target: Path, *, num_bytes: int | None, reason: str) -> ValueError:
    parent = target.absolute().parent
    free = f"{shutil.disk_usage(parent).free / 1e9:.2f} GB are free"
    if num_bytes is None:
        return ValueError(f"{target}: {reason}. {free} in {parent}")
    needed = f"About {(num_bytes + RESERVE_BYTES) / 1e9:.2f} GB are needed"
    return ValueError(f"{target}: {reason}. {needed} in {parent}, {free} there")


def _flush(folder: Path) -> None:
    """Returns when every file and folder below, and `folder` itself, is on the disk."""
    for base, _, files in os.walk(folder):
        for file in files:
            _flush_entry(Path(base) / file)
        _flush_entry(Path(base))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system on which folders cannot be flushed
            raise
    finally:
        os.close(descriptor)
