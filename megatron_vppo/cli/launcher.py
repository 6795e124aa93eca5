"""The process that starts the trainer ranks of this machine, waits for them, and tells the user why they failed.

    python -m megatron_vppo.cli.launcher RANKS LOGS PROGRAM...

runs `python PROGRAM...` on RANKS ranks. LOGS is the folder of their logs. torch's elastic agent starts the ranks, as it
does for `torchrun --standalone`. When one fails, it ends the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_vppo.cli.errors import STOPPED, error_text, is_mistake, mistake_status, show
from megatron_vppo.cli.output import READER_LEFT
from megatron_vppo.cli.rank_error import parse_error, rank_log
from megatron_vppo.cli.trainer_rank import LAUNCHER_VARIABLE
from megatron_vppo.system.owned_folder import OwnedFolder, remove_left_folders
from megatron_vppo.system.processes import children_of
from megatron_vppo.system.stop_signals import SAME_REQUEST_SECONDS

_FOLDER_PREFIX = "vppo-ranks-"
_AGENT = "torch.distributed"
"""The logger of torch's agent."""
MEANINGS: dict[int, str] = {
    signal.SIGKILL: "usually the kernel's answer when the machine runs out of memory, see `dmesg`",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGILL: "a crash in native code, often built for another processor",
    signal.SIGFPE: "a crash in native code",
    signal.SIGBUS: "a crash in native code, often because /dev/shm is full",
    signal.SIGABRT: "a native library gave up, such as NCCL when it was out of time",
}
"""The usual meaning of a signal that has ended a rank."""


def main(arguments: Sequence[str]) -> int:
    """Runs the ranks and returns the exit status of the run."""
    num_ranks, logs, *program = arguments
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    log = Path(logs) / "launcher.log"
    _log_agent_to(log)
    try:
        return _run(int(num_ranks), Path(logs), program)
    except Exception as error:  # no free port, no room for the files of the ranks' errors
        logging.getLogger(_AGENT).exception("the launcher failed")
        show(f"the launcher: {error_text(error)} (traceback: {log})", sys.stderr)
        return mistake_status(error) if is_mistake(error) else 1


def _run(num_ranks: int, logs: Path, program: Sequence[str]) -> int:
    requests = _StopRequests()
    try:
        remove_left_folders(prefix=_FOLDER_PREFIX)
        error_files = OwnedFolder(prefix=_FOLDER_PREFIX)
        try:
            elastic_launch(_launch_config(num_ranks, str(error_files.path)), sys.executable)("-u", *program)
        finally:
            error_files.remove()
    except ChildFailedError as error:
        if any(failure.exitcode == STOPPED for failure in error.failures.values()):
            return STOPPED
        if requests.first is not None:  # there was nothing to save yet
            return _ended_by(requests.first)
        status, text = explain(error.failures, logs)
        if text is not None:
            show(text, sys.stderr)
        return status
    except (SignalException, KeyboardInterrupt) as error:
        return _ended_by(error.sigval if isinstance(error, SignalException) else signal.SIGINT)
    return 0


def _ended_by(number: int) -> int:
    show(f"ended by {signal.Signals(number).name}", sys.stderr)
    return 128 + number


class _StopRequests:
    """Passes SIGTERM and SIGUSR2 on to the ranks as a request to stop. A second one ends them, as torch's agent does.

    Ranks get SIGUSR2 for both: SIGTERM is what the agent ends them with when one of them has failed.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        """The signal that asked first; None: no one has."""
        self._time = 0.0
        self.started = False
        """True once there are ranks."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.first is not None and time.monotonic() - self._time >= SAME_REQUEST_SECONDS:
            raise SignalException("a second request to stop", sigval=signal.Signals(number))
        if self.first is None:
            self.first, self._time = number, time.monotonic()
        ranks = children_of(os.getpid())
        if not ranks and self.started:
            return  # the last one has just ended
        if not ranks:
            raise SignalException("a request to stop before there are ranks", sigval=signal.Signals(number))
        self.started = True
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR2)


def explain(failures: Mapping[int, ProcessFailure], logs: Path) -> tuple[int, str | None]:
    """Finds the failure that the others follow from.

    Args:
        failures: by rank, in the order in which the agent saw ranks end; also those that it then ended with SIGTERM.

    Returns:
        The exit status of the run, and the message for the user; None: nobody reads the output any more.
    """
    written = {rank: parse_error(failure.error_file_data) for rank, failure in failures.items()}
    errors = sorted(filter(None, written.values()), key=lambda error: error.time)
    causes = [error for error in errors if not error.lost_contact]
    if causes:
        return causes[0].status, causes[0].text()
    for position, (rank, failure) in enumerate(failures.items()):
        ended_by_agent = failure.exitcode == -signal.SIGTERM and position > 0
        if written[rank] is None and not ended_by_agent:
            return _explain_silent_end(rank, failure.exitcode, rank_log(logs, rank))
    return errors[0].status, errors[0].text()


def _explain_silent_end(rank: int, exitcode: int, log: Path) -> tuple[int, str | None]:
    """Explains the end of a rank that has not reported an exception."""
    if exitcode == READER_LEFT:
        return READER_LEFT, None
    if exitcode > 0:
        return 1, f"rank {rank} ended with exit status {exitcode} and reported no exception (log: {log})"
    number = -exitcode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    meaning = f": {MEANINGS[number]}" if number in MEANINGS else ""
    return 1, f"rank {rank} was ended by {name}{meaning} (log: {log})"


def _launch_config(num_ranks: int, error_files: str) -> LaunchConfig:
    """Returns what `torchrun --standalone --nproc-per-node=NUM_RANKS` sets: one machine, a free port, no restarts."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=error_files),
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # _StopRequests has SIGTERM
    )


class _AgentLog(logging.FileHandler):
    """A log that nobody misses while the ranks' own errors are told: where it cannot be written, nothing is said."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # it cannot be opened
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _log_agent_to(path: Path) -> None:
    """Sends what the agent logs to a file, which is made with the first line."""
    logger = logging.getLogger(_AGENT)
    handler = _AgentLog(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for its_own in logger.handlers[:]:
        logger.removeHandler(its_own)
    logger.addHandler(handler)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
