"""Runs one after the other. The programs stand for `vppo train`; processes and signals are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vppo.sweep.execute import execute
from megatron_vppo.sweep.plan import SweepRun
from megatron_vppo.system.processes import child_environment
from tests.sweep.folders import make_sweep
from tests.system.marked import processes_with, wait_until_gone

pytestmark = pytest.mark.distributed
STOPPED = 75


def shell(lines: dict[str, str]) -> Callable[[SweepRun], list[str]]:
    """The command of a run: bash, which notes the run's name and then does its line."""
    return lambda run: ["bash", "-c", f"echo {run.name} >>ran; {lines.get(run.name, 'true')}"]


def test_a_run_that_fails_does_not_keep_the_next_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    lines = {"dapo-seed1": "exit 3", "vppo-seed2": "kill -9 $$"}
    outcome = execute(make_sweep(tmp_path).runs, shell(lines), stopped=STOPPED, say=said.append)
    assert (tmp_path / "ran").read_text().split() == ["vppo-seed1", "dapo-seed1", "vppo-seed2", "dapo-seed2"]
    assert outcome.failed == {"dapo-seed1": 3, "vppo-seed2": -9} and outcome.stopped_by is None
    assert "sweep: dapo-seed1 failed: exit status 3" in said
    assert "sweep: vppo-seed2 failed: ended by SIGKILL" in said


def test_a_run_that_was_asked_to_stop_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    outcome = execute(make_sweep(tmp_path).runs, shell({"dapo-seed1": "exit 75"}), stopped=STOPPED, say=said.append)
    assert (tmp_path / "ran").read_text().split() == ["vppo-seed1", "dapo-seed1"]
    assert outcome.failed == {} and outcome.stopped_by == STOPPED
    assert said[-1] == "sweep: stopped in dapo-seed1; the same command goes on from there"


PROGRAM = """
import sys
from pathlib import Path
from megatron_vppo.sweep.execute import execute
from tests.sweep.folders import make_sweep
line = sys.argv[2]
command = lambda run: [sys.executable, "-c", line, run.name]
print(execute(make_sweep(Path(sys.argv[1])).runs, command, stopped=75, say=print))
"""
RUN = """
import signal, sys, time
def told(number, frame):
    print(f"got {signal.Signals(number).name}", flush=True)
    sys.exit(75 if number == signal.SIGTERM else 9)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, told)
print("started", sys.argv[1], flush=True)
time.sleep(60)
"""


def signals_of_a_terminal() -> None:
    """Tests may run in the background or under nohup, where some are ignored or blocked."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


def start(
    folder: Path, line: str = RUN, preexec_fn: Callable[[], object] = signals_of_a_terminal, **options: object
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, str(folder), line], stdout=subprocess.PIPE, text=True,
        env={**child_environment(), "VPPO_TEST_MARK": f"mark of {folder}"}, preexec_fn=preexec_fn,
        **options,  # type: ignore[call-overload]
    )  # fmt: skip
    assert process.stdout is not None
    assert "vppo-seed1 (1 of 4)" in process.stdout.readline()
    assert process.stdout.readline() == "started vppo-seed1\n"
    return process


@pytest.mark.parametrize(
    ("number", "passed_on", "status"),
    [
        (signal.SIGINT, "SIGINT", 130),
        (signal.SIGHUP, "SIGHUP", 129),
        (signal.SIGTERM, "SIGTERM", STOPPED),
        (signal.SIGUSR2, "SIGTERM", STOPPED),
    ],
)
def test_signals_reach_the_run_once_and_end_the_sweep(
    tmp_path: Path, number: signal.Signals, passed_on: str, status: int
) -> None:
    """To the whole process group, as Ctrl-C in a terminal sends it."""
    with start(tmp_path, start_new_session=True) as process:
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=30)
    assert out.splitlines() == [
        f"got {passed_on}",
        "sweep: stopped in vppo-seed1; the same command goes on from there",
        f"SweepOutcome(failed={{}}, stopped_by={status})",
    ]


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """It is under nohup."""
    line = "import sys, time; print('started', sys.argv[1], flush=True); time.sleep(1); sys.exit(75)"
    with start(tmp_path, line, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=30)
    assert out.splitlines()[-1] == "SweepOutcome(failed={}, stopped_by=75)", "the run was not told"


def test_a_run_ends_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    with start(tmp_path) as process:
        process.kill()
        process.wait()
    wait_until_gone(f"mark of {tmp_path}")
    assert processes_with(f"mark of {tmp_path}") == {}
