"""The process of an engine, from the trainer's side: started without waiting, reached over a socket, always ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_vppo.rollout import os_processes
from megatron_vppo.rollout.records import PROGRESS, EngineSettings
from megatron_vppo.system.owned_folder import OwnedFolder, remove_left_folders
from megatron_vppo.system.processes import child_environment
from megatron_vppo.system.stop_signals import StopRequested

_MODULE = "megatron_vppo.rollout.engine_process"
FOLDER_PREFIX = "vppo-engine-"
LOG_TAIL_LINES = 30
POLL_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 1.0
"""The most that one wait of POLL_SECONDS counts: while this process is stopped, as by `scontrol suspend`, the engine is
stopped as well and not silent."""
GRACE_SECONDS = 5.0
"""The time from the request to end until SIGTERM, and again from SIGTERM until SIGKILL."""

_FULL_BYTES = 2**20
"""The free space below which a disk counts as full."""


class EngineLost(RuntimeError):
    """The error of an engine whose process has ended, hangs or cannot go on. Another one may do what it was asked."""

    def __init__(self, what: str, *, log_end: str) -> None:
        super().__init__(f"{what}; {log_end}")
        self.what = what
        """The message without the end of the log."""


class _Limit:
    """A time from now on. While this process is stopped, it stands still."""

    def __init__(self, seconds: float | None) -> None:
        """`seconds`: None: without end."""
        self._seconds = seconds
        self._waited, self._before = 0.0, time.monotonic()

    def is_over(self) -> bool:
        """Returns True if the time has passed; to be asked every LONGEST_WAIT_SECONDS at least."""
        now = time.monotonic()
        self._waited, self._before = self._waited + min(now - self._before, LONGEST_WAIT_SECONDS), now
        return self._seconds is not None and self._waited > self._seconds


class ChildProcess:
    """Starts the process of one engine and talks to it. Once it is lost, every call raises the same error again.

    The process has a session of its own, so Ctrl-C in the trainer's terminal does not reach it. It ends with `close`,
    and within seconds by itself when the trainer is gone (`engine_process.start_watchdog`).
    """

    def __init__(self, settings: EngineSettings, *, log_path: Path, silence_seconds: float | None = None) -> None:
        """
        Args:
            silence_seconds: the time without a sign of progress after which an engine that was asked something hangs;
                None: it never does.
        """
        self.log_path = log_path
        self._silence_seconds = silence_seconds
        self._lost: EngineLost | None = None
        self._silent = _Limit(silence_seconds)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = _temporary_folder()
        ours, theirs = socket.socketpair()
        if silence_seconds is not None:  # a process that is stopped does not read
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(silence_seconds) + 1, 0))
        with theirs, log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno()), str(self._folder.path)],
                env=engine_environment(settings, folder=self._folder.path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self.pid = self._process.pid
        self.send(settings)

    def send(self, message: Any) -> None:
        """Sends a request. Raises EngineLost if the process has ended, or does not take the request."""
        self._require_alive()
        self._silent = _Limit(self._silence_seconds)
        try:
            self._connection.send(message)
        except BlockingIOError as error:  # SO_SNDTIMEO
            raise self.lost(self._silence()) from error
        except OSError as error:
            raise self._end_of_process() from error

    def receive(self, *, timeout_seconds: float | None = None, stop_wanted: Callable[[], bool] = lambda: False) -> Any:
        """Waits for the next answer.

        Args:
            timeout_seconds: the time for the whole answer, progress or not; None: silence_seconds without progress.

        Raises:
            EngineLost: the process ended or time is over.
            StopRequested: `stop_wanted` became true. The answer is still to come.
        """
        limit = None if timeout_seconds is None else _Limit(timeout_seconds)
        self._silent = _Limit(self._silence_seconds)
        while True:
            answer = self.look(POLL_SECONDS, patient=limit is not None)
            if answer is not None:
                return answer
            if stop_wanted():
                raise StopRequested
            if limit is not None and limit.is_over():
                raise self.lost(f"did not answer within {timeout_seconds:.0f} seconds")

    def look(self, seconds: float = 0.0, *, patient: bool = False) -> Any:
        """Returns the next answer, or None if there is none within `seconds`.

        Args:
            patient: True: silence means nothing, because nothing was asked, or because there is another limit.

        Raises:
            EngineLost: the process ended, or was silent for silence_seconds.
        """
        self._require_alive()
        ended = self._process.poll() is not None  # before the poll: an answer sent just before the end still counts
        try:
            if self._connection.poll(seconds):
                self._silent = _Limit(self._silence_seconds)
                answer = self._connection.recv()
                return None if answer == PROGRESS else answer
        except (EOFError, OSError) as error:
            raise self._end_of_process() from error
        if ended:
            raise self._end_of_process()
        if patient:
            self._silent = _Limit(self._silence_seconds)
        elif self._silent.is_over():
            raise self.lost(self._silence())
        return None

    @property
    def is_lost(self) -> bool:
        """True if every call raises EngineLost."""
        return self._lost is not None

    def fileno(self) -> int:
        """Returns the descriptor that is readable when the process has sent something."""
        return self._connection.fileno()

    def lost(self, what: str) -> EngineLost:
        """Builds the error of an engine that is lost because of `what`, and keeps it for later calls."""
        self._lost = EngineLost(f"the rollout engine (process {self.pid}) {what}", log_end=self._log_end())
        return self._lost

    def refusal(self, what: str) -> RuntimeError:
        """Builds the error of an engine that answered with an error and goes on."""
        return RuntimeError(f"the rollout engine (process {self.pid}) refused: {what}; {self._log_end()}")

    def _log_end(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        # An engine ends when it cannot write a line of its log.
        full = "its disk is full; " if shutil.disk_usage(self.log_path).free < _FULL_BYTES else ""
        return f"{full}end of {self.log_path}:\n" + "\n".join(f"  | {line}" for line in lines)

    def _silence(self) -> str:
        return f"made no progress for {self._silence_seconds:.0f} seconds (rollout.engine_timeout_seconds)"

    def _require_alive(self) -> None:
        if self._lost is not None:
            raise self._lost

    def close(self, *, goodbye: Any = None) -> None:
        """Ends the process and everything that it started. Sends `goodbye` first and waits, if given. Idempotent."""
        if self._connection.closed:
            return
        if goodbye is not None and self._lost is None and self._process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._connection.send(goodbye)
                self._process.wait(GRACE_SECONDS)
        self._connection.close()
        # The engine has inherited the signals that are blocked here (system/stop_signals.py).
        blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        for kill_signal in (signal.SIGKILL,) if blocked else (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, kill_signal)
            if self._wait_for_group():
                break
        self._process.wait()
        self._folder.remove()

    def _end_of_process(self) -> EngineLost:
        """Builds the error of a process whose end of the connection is closed; its exit may follow in a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        return self.lost(f"ended with {self._exit_status()}")

    def _wait_for_group(self) -> bool:
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            self._process.poll()
            if not os_processes.members(self.pid):
                return True
            time.sleep(0.02)
        return False

    def _exit_status(self) -> str:
        code = self._process.poll()
        if code is None:
            return "its connection closed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _temporary_folder() -> OwnedFolder:
    """Makes the folder for the sockets and temporary files of an engine, which vLLM itself never removes.

    Removes those of engines on this machine that were killed together with everything that would have removed them.
    The path is short, since that of a socket has at most 107 bytes.
    """
    base = os.environ.get("VLLM_RPC_BASE_PATH")
    where = Path(base) if base else None
    remove_left_folders(prefix=FOLDER_PREFIX, base=where, first=os_processes.unlink_segments_named_in)
    return OwnedFolder(prefix=FOLDER_PREFIX, base=where)


def engine_environment(settings: EngineSettings, *, folder: Path) -> dict[str, str]:
    """Returns the environment of an engine: that of any child, and what vLLM needs.

    Args:
        folder: the folder for its sockets and temporary files.
    """
    environment = child_environment()
    # Compiled code outlives the engine.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    environment["TMPDIR"] = environment["VLLM_RPC_BASE_PATH"] = str(folder)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["VLLM_NO_USAGE_STATS"] = "1"
    # vLLM's scheduler runs in the process we start: one process less, and one hop less for every token.
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if settings.enforce_eager:
        environment["TORCH_COMPILE_DISABLE"] = "1"
    if Path(settings.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if settings.cuda_visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = settings.cuda_visible_devices
    if settings.device == "cpu":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["OMP_NUM_THREADS"] = str(settings.cpu_threads)
        # Idle OpenMP threads sleep instead of spinning, since the trainer uses the cores while the engine waits.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment["GOMP_SPINCOUNT"] = "0"
        environment["KMP_BLOCKTIME"] = "0"
    return environment
