"""The error of a trainer rank, as it goes from the rank to the launcher and to the user.

A rank writes it into the file that torchrun and our launcher name in TORCHELASTIC_ERROR_FILE, in torch's format, so
that torchrun shows the message, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vppo.cli.errors import error_text, is_mistake, message_of, mistake_status
from megatron_vppo.system.whole import whole_file

_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_KEY = "rank_error"


@dataclass(frozen=True, slots=True)
class RankError:
    """The exception that ended a rank."""

    rank: int
    host: str | None
    """The rank's machine; None if all ranks run on one."""
    message: str
    status: int
    """The exit status of the rank."""
    time: float
    """Seconds since 1970 when the rank reported the error."""
    lost_contact: bool
    """True if a collective failed: then the cause is most likely an error of another rank."""
    log: str | None
    """The file with the traceback; None if it could not be opened."""

    def text(self) -> str:
        """Returns the message for the user."""
        place = f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        what = f"{place} lost contact with another rank" if self.lost_contact else place
        end = "\n" if "\n" in self.message else " "
        traceback = f"{end}(traceback: {self.log})" if self.log else ""
        return f"{what}: {self.message}{traceback}"


def rank_log(logs: Path, rank: int) -> Path:
    """Returns the file that a rank's standard error goes to."""
    return logs / f"trainer_rank_{rank}.log"


def describe(error: BaseException, *, rank: int, log: Path | None) -> RankError:
    """Describes an exception that has ended this rank."""
    return RankError(
        rank=rank,
        host=socket.gethostname() if _several_hosts() else None,
        message=error_text(error),
        status=mistake_status(error) if is_mistake(error) else 1,
        time=time.time(),
        lost_contact=any(_is_collective(link) for link in _chain(error)),
        log=None if log is None else str(log),
    )


def write_error(error: RankError) -> bool:
    """Writes the error for the process that started this rank. Returns False if that is not possible."""
    path = os.environ.get(_FILE_VARIABLE)
    if not path:
        return False
    content = {"message": error.message, "timestamp": int(error.time), _KEY: dataclasses.asdict(error)}
    try:
        with whole_file(Path(path)) as file:
            file.write(json.dumps(content).encode())
    except OSError:
        return False
    return True


def parse_error(content: Mapping[str, Any]) -> RankError | None:
    """Returns the error in the content of an error file; None if the rank did not write one."""
    return RankError(**content[_KEY]) if _KEY in content else None


def _several_hosts() -> bool:
    """Returns True if torchrun or srun has started ranks on several machines."""
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1) > 1


def _is_collective(error: BaseException) -> bool:
    """Returns True for a collective that failed: torch has types for NCCL and its store, and none for gloo."""
    torch = sys.modules.get("torch")  # not there if its import is what failed
    of_torch = torch is not None and isinstance(error, torch.distributed.DistError)
    return of_torch or (type(error) is RuntimeError and "/gloo/" in message_of(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it follows from, each once: they may follow from each other."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
