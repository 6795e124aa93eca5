"""Temporary folders that the next start removes where their owner could not, because it was killed or lost its power.

The owner holds a lock on its folder. The kernel lets go of it when the owner is gone, however it went.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

YOUNG_SECONDS = 10.0
"""The age below which a folder without a lock is left alone: its owner may be about to lock it."""


class OwnedFolder:
    """A temporary folder of this process."""

    def __init__(self, *, prefix: str, base: Path | None = None) -> None:
        """
        Args:
            base: the folder to make it in; None: the system's for temporary files.
        """
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        self._lock: int | None = os.open(self.path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Removes it, if it is there; harmless when repeated."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_left_folders(
    *, prefix: str, base: Path | None = None, first: Callable[[Path], None] = lambda folder: None
) -> None:
    """Removes folders of this user that `OwnedFolder` made and whose owners are gone.

    Args:
        first: called with each of them before it is removed.
    """
    for folder in (base or Path(tempfile.gettempdir())).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another start removes it, or there are no locks
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < YOUNG_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                first(folder)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
