"""The process of an engine, from the trainer's side: started without waiting, reached over a socket, always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_vppo.rollout import os_processes
from megatron_vppo.rollout.records import EngineSettings
from megatron_vppo.system.processes import child_environment
from megatron_vppo.system.stop_signals import StopRequested

LOG_TAIL_LINES = 30
POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""The time from the request to end until SIGTERM, and again from SIGTERM until SIGKILL."""


class ChildProcess:
    """Starts the process of one engine and talks to it.

    The process has a session of its own, so Ctrl-C in the trainer's terminal does not reach it. It ends with `close`,
    and within seconds by itself when the trainer is gone (`engine_process.start_watchdog`).
    """

    def __init__(self, settings: EngineSettings, *, log_path: Path) -> None:
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs, log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_vppo.rollout.engine_process", str(theirs.fileno())],
                env=engine_environment(settings),
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
        """Sends a request. Raises RuntimeError, with the end of the log, if the process has ended."""
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._end_of_process() from error

    def receive(self, *, timeout_seconds: float | None = None, stop_wanted: Callable[[], bool] = lambda: False) -> Any:
        """Waits for the next answer.

        Raises:
            RuntimeError: the process ended or time is over; with the end of the log.
            StopRequested: `stop_wanted` became true. The answer is still to come.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            ended = self._process.poll() is not None  # before the poll: an answer sent just before the end still counts
            try:
                if self._connection.poll(POLL_SECONDS):
                    return self._connection.recv()
            except (EOFError, OSError) as error:
                raise self._end_of_process() from error
            if ended:
                raise self._end_of_process()
            if stop_wanted():
                raise StopRequested
            if deadline is not None and time.monotonic() > deadline:
                raise self.failure(f"did not answer within {timeout_seconds:.0f} seconds")

    def failure(self, what: str) -> RuntimeError:
        """Builds the error of an engine that `what` happened to, with the end of its log."""
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines)
        return RuntimeError(f"the rollout engine (process {self.pid}) {what}; end of {self.log_path}:\n{tail}")

    def close(self, *, goodbye: Any = None) -> None:
        """Ends the process and everything that it started. Sends `goodbye` first and waits, if given. Idempotent."""
        if self._connection.closed:
            return
        if goodbye is not None and self._process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._connection.send(goodbye)
                self._process.wait(GRACE_SECONDS)
        self._connection.close()
        for kill_signal in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, kill_signal)
            if self._wait_for_group():
                break
        self._process.wait()

    def _end_of_process(self) -> RuntimeError:
        """Builds the error of a process whose end of the connection is closed; its exit may follow in a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        return self.failure(f"ended with {self._exit_status()}")

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


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """Returns the environment of an engine: that of any child, and what vLLM needs."""
    environment = child_environment()
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
