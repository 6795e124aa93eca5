"""The ranks of an attempt that have ended without an error, as the others find them in the folder of the logs.

A rank that a signal has ended says nothing, and under srun nobody tells the others. So each rank that reports an error
leaves a mark, and the first line of its log says which process of which machine it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from megatron_vppo.cli.rank_error import rank_log

MOST_NAMED = 4
"""The most ranks, or machines, that a message lists."""
_BEGIN = re.compile(r"\(rank (?P<rank>\d+) of \d+, process (?P<process>\d+) on (?P<host>\S+)\)$", flags=re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SilentRank:
    """A rank that has reported nothing."""

    rank: int
    process: int
    host: str

    def is_gone(self) -> bool:
        """Returns True if its process is known to be gone, which only its own machine knows."""
        return self.host == socket.gethostname() and not _is_alive(self.process)

    def text(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


def mark_reported(logs: Path, rank: int) -> None:
    """Notes that this rank has reported its error."""
    with contextlib.suppress(OSError):
        _mark(logs, rank).write_text(str(os.getpid()))


def explain_silence(logs: Path, *, world_size: int) -> str | None:
    """Says which ranks have reported nothing. Returns None if all have, or ranks of too many machines have not."""
    silent = []
    for rank in range(world_size):
        found = _last_beginning(rank_log(logs, rank))
        if found is not None and not _has_reported(logs, found):
            silent.append(found)
    if gone := [rank for rank in silent if rank.is_gone()]:
        return f"{_listed(gone)} ended without an error: a signal, usually SIGKILL when memory runs out"
    hosts = sorted({rank.host for rank in silent})
    if not silent or len(hosts) > MOST_NAMED:
        return None
    who = _listed(silent) if len(silent) <= MOST_NAMED else f"{len(silent)} ranks on {', '.join(hosts)}"
    return f"{who} reported nothing so far: killed, cut off, or hanging"


def _listed(ranks: list[SilentRank]) -> str:
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return ", ".join(rank.text() for rank in ranks[:MOST_NAMED]) + more


def _last_beginning(log: Path) -> SilentRank | None:
    """Reads who writes a log. The last line of this form counts: attempts of the same name share their logs."""
    try:
        found = list(_BEGIN.finditer(log.read_text(errors="replace")))
    except OSError:
        return None
    if not found:
        return None
    last = found[-1]
    return SilentRank(int(last["rank"]), int(last["process"]), last["host"])


def _has_reported(logs: Path, rank: SilentRank) -> bool:
    try:
        return _mark(logs, rank.rank).read_text() == str(rank.process)
    except OSError:
        return False


def _mark(logs: Path, rank: int) -> Path:
    return logs / f".reported_{rank}"


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
