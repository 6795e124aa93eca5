"""The proof that all hosts see the same run folder, and not each a folder of the same name on a disk of its own.

Rank 0 writes a word into a file that has never been there. The first rank of every other host reads it, and writes a
file of its own next to it, which rank 0 has to see. A network file system may show a new file seconds later.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

_PREFIX = ".host_check."
_PATIENCE_SECONDS = 15.0


def begin_check(root: Path) -> str:
    """Makes the run folder and writes the word, on rank 0. Returns the word.

    Raises OSError, with the path, if this host cannot write there.
    """
    root.mkdir(parents=True, exist_ok=True)
    give_up_check(root)  # of an attempt that was killed
    word = secrets.token_hex(8)
    folder = root / f"{_PREFIX}{word}"
    folder.mkdir()
    (folder / "rank_0").write_text(word)
    return word


def give_up_check(root: Path) -> None:
    """Removes what the check has written, on rank 0."""
    for left in root.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def answer_check(root: Path, word: str, *, rank: int) -> str | None:
    """Reads the word on another host, and writes an answer.

    Returns:
        The reason why this host cannot work in the folder; None if it can.
    """
    folder = root / f"{_PREFIX}{word}"
    if not _appears(folder / "rank_0", word):
        return (
            f"does not see what rank 0's host writes into {root.absolute()} (waited {_PATIENCE_SECONDS:.0f} s): it is "
            "not the same folder"
        )
    try:
        (folder / f"rank_{rank}").write_text(word)
    except OSError as error:
        return f"cannot write into {root.absolute()}: {error.strerror}"
    return None


def end_check(root: Path, word: str, answers: Mapping[str, int]) -> list[str]:
    """Looks for the answers on rank 0, and removes all that the check has written.

    Args:
        answers: the hosts that say that they have answered, each with the rank that did.

    Returns:
        The hosts whose answers rank 0 does not see.
    """
    folder = root / f"{_PREFIX}{word}"
    try:
        return [host for host, rank in answers.items() if not _appears(folder / f"rank_{rank}", word)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _appears(path: Path, word: str) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            if path.read_text() == word:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
