"""The heap of this process."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives the memory that was freed back to the operating system.

    glibc keeps it otherwise, and between pieces that are still in use there is ever more of it. Other C libraries have
    no such call; nothing happens there.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
