"""Work that takes many times longer than before: real processes that hang, are slow, or are stopped."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time

BEGIN = """
    import ctypes, os, threading, time
    from megatron_vppo.system import watchdog
    watchdog.TICK_SECONDS, watchdog.LOCKED_SECONDS = 0.1, 0.5

    def end(arguments):
        print(type(arguments.exc_value).__name__, arguments.exc_value, flush=True)
        os._exit(7)

    threading.excepthook = end
    dog = watchdog.Watchdog(factor=4, least_seconds=0.4, grace_seconds=0.3)

    def work(seconds, kind="step", sleep=time.sleep):
        with dog.watch(kind, f"this {kind}"):
            sleep(seconds)

    for _ in range(watchdog.KNOWN):
        work(0.01)
"""


def start(script: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(BEGIN) + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(script: str) -> tuple[int, str, str]:
    process = start(script)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


MESSAGE = "this step takes longer than 0 seconds, and the median so far is 0 (trainer.watchdog)"


def test_work_that_hangs_leaves_its_stack_and_ends() -> None:
    began = time.monotonic()
    status, out, err = run("work(60)")
    assert (status, out) == (7, f"TookTooLong {MESSAGE}\n")
    assert err.startswith(f"--- {MESSAGE}; all threads of this process:\n")
    assert re.search(r'File "<string>", line \d+ in work$', err, flags=re.MULTILINE)
    assert time.monotonic() - began < 30


def test_work_that_goes_on_within_the_grace_lives() -> None:
    status, out, err = run("work(0.55); time.sleep(0.5); print('done')")
    assert (status, out) == (0, "done\n")
    assert err.endswith("--- this step went on\n")


def test_there_is_no_limit_before_three_times_are_known_nor_with_factor_0() -> None:
    assert run("work(0.9, kind='other'); work(0.01, kind='other'); work(0.9, kind='other')") == (0, "", "")
    assert run("dog._factor = 0; work(0.9)") == (0, "", "")


def test_the_limit_is_a_multiple_of_the_median() -> None:
    """0.3 s three times: the limit is 1.2 s and not 0.4 s; one outlier does not change it."""
    usual = "for _ in range(3): work(0.3, kind='other')\n"
    assert run(usual + "work(0.9, kind='other'); work(0.9, kind='other')") == (0, "", "")
    status, out, _ = run(usual + "work(0.9, kind='other'); work(60, kind='other')")
    assert status == 7 and "this other takes longer than 1 seconds" in out


def test_work_within_other_work_has_a_clock_of_its_own() -> None:
    inner = "with dog.watch('step', 'outer'):\n  work({}, kind='validation')\n  time.sleep({})\nprint('done')"
    assert run(inner.format(1.2, 0.01)) == (0, "done\n", ""), "validation has no limit yet"
    status, out, _ = run(inner.format(0.01, 60))
    assert status == 7 and out.startswith("TookTooLong outer takes longer")


def test_work_that_an_exception_ended_has_no_time() -> None:
    broken = "try:\n  with dog.watch('other'): raise KeyError\nexcept KeyError: pass\n"
    assert run(broken * 3 + "work(0.9, kind='other')") == (0, "", "")


def test_a_process_that_was_stopped_is_not_blamed() -> None:
    process = start("print('working', flush=True)\nwork(0.3)\nprint('done')")
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "done\n", "")


def test_a_thread_that_holds_the_interpreter_ends_as_well() -> None:
    """A call that keeps the lock: no other Python thread runs, and faulthandler acts."""
    status, out, err = run("work(60, sleep=lambda seconds: ctypes.PyDLL(None).sleep(seconds))")
    assert (status, out) == (1, "")
    assert err.startswith("Timeout (0:00:0") and re.search(r"line \d+ in work$", err, flags=re.MULTILINE)
