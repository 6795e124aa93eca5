"""Signals that ask for a stop, sent to a process of its own that is busy outside Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ctypes, os, signal, subprocess, sys
from megatron_vppo.system import stop_signals
from megatron_vppo.system.stop_signals import StopSignals
stop_signals.SAME_REQUEST_SECONDS = 3.0
signals = StopSignals([signal.SIGUSR2, signal.SIGTERM], ended_by=os.getppid() if "child" in sys.argv else None)
if "work" in sys.argv:
    signals.begin_work()
if "work" in sys.argv:
    from multiprocessing import shared_memory
    memory = shared_memory.SharedMemory(create=True, size=8)  # in Python 3.11 the first one unblocks SIGTERM
    memory.close()
    memory.unlink()
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
for _ in range(600):  # libc's call goes on where a signal would end it, as a collective does
    ctypes.CDLL(None).usleep(100_000)
    if signals.request:
        print(signals.request.name, round(signals.seconds_since_request, 1), flush=True)
        break
ctypes.CDLL(None).pause()
"""


@pytest.fixture
def start():
    started: list[tuple[subprocess.Popen[str], int]] = []

    def begin(*arguments: str) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield begin
    for process, child in started:
        process.kill()
        process.communicate()
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("asked", [signal.SIGUSR2, signal.SIGTERM])
def test_the_first_signal_asks_and_a_later_one_ends(start, asked: signal.Signals) -> None:
    process, child = start("work")
    process.send_signal(asked)
    name, seconds = process.stdout.readline().split()
    assert name == asked.name and float(seconds) < 3
    process.send_signal(signal.SIGUSR2)  # of the same request
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert process.stderr.read() == "ended by SIGTERM\n"
    os.kill(child, asked)  # what it has started does not see the signals
    time.sleep(0.1)
    os.kill(child, 0)


def test_before_there_is_work_a_signal_ends(start) -> None:
    process, _ = start()
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=10) == 128 + signal.SIGUSR2


def test_sigterm_of_the_launcher_ends_at_once(start) -> None:
    """It has started the process, as this test has. From anyone else SIGTERM is a request."""
    process, _ = start("work", "child")
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    assert process.stdout.readline().split()[0] == "SIGTERM"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
