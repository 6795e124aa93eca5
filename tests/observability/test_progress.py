"""The terminal lines, on a real pseudo-terminal and on a plain stream."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import time

from megatron_vppo.observability.progress import Progress, clock, step_line

METRICS = {
    "critic/score/mean": 0.52,
    "reward/accuracy": 0.55,
    "rollout/kept_groups": 40.0,
    "rollout/sampled_groups": 48.0,
    "response_length/mean": 31.2,
    "timing_s/gen": 4.1,
    "timing_s/score": 1.0,
    "timing_s/adv": 0.01,
    "timing_s/update_actor": 3.2,
    "timing_s/update_weights": 0.2,
    "timing_s/step": 8.7,
}


def test_the_line_of_a_step() -> None:
    assert step_line(3, METRICS, total_steps=30, mean_seconds=8.7) == (
        "step 3/30  reward 0.52  acc 0.55  kept 40/48  len 31.2"
        "  | rollout 4.1s score 1.0s update 3.2s sync 0.2s | 8.7s/step, ETA 3:55"
    )


def test_a_step_without_metrics_or_total_still_has_a_line() -> None:
    assert step_line(7, {"timing_s/step": 1.0}, total_steps=None, mean_seconds=1.0) == "step 7 | 1.0s/step"
    skipped = step_line(7, {"timing_s/step": 1.0, "rollout/skipped_steps": 1.0}, total_steps=None, mean_seconds=None)
    assert "skipped" in skipped


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 5.2, 60, 236, 3599.5, 3661)] == [
        "0:00", "0:06", "1:00", "3:56", "1:00:00", "1:01:01",
    ]  # fmt: skip


def test_a_log_file_gets_one_plain_line_per_step() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=2, stream=stream, refresh_seconds=0.01)
    for step in (1, 2):
        progress.begin_step(step)
        progress.begin_phase("gen")
        time.sleep(0.05)
        progress.end_phase()
        progress.end_step(step, METRICS)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line[:9] for line in lines] == ["step 1/2 ", "step 2/2 "]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert lines[0].endswith("ETA 0:09") and "ETA" not in lines[1]


class Screen:
    """The reading end of a pseudo-terminal: all that was sent to it, as it comes."""

    def __init__(self, master: int) -> None:
        self.raw = ""
        self._master = master
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: the writing end was closed
            while data := os.read(self._master, 4096):
                self.raw += data.decode()

    def wait_for(self, pattern: str, *, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not re.search(pattern, self.raw):
            assert time.monotonic() < end, f"no {pattern!r} in {self.raw!r}"
            time.sleep(0.01)

    def wait_closed(self) -> None:
        self._thread.join(timeout=20.0)
        os.close(self._master)


def test_a_terminal_shows_the_running_phase_and_keeps_only_the_step_lines() -> None:
    master, slave = os.openpty()
    screen = Screen(master)
    with os.fdopen(slave, "w") as terminal:
        progress = Progress(total_steps=2, stream=terminal, refresh_seconds=0.02)
        progress.begin_step(1)
        progress.begin_phase("update_actor")
        screen.wait_for(r"\r\x1b\[Kstep 1/2  update \d+s  \(\d+s in this step\)")
        progress.end_phase()
        progress.end_step(1, METRICS)
        screen.wait_for(r"8\.7s/step, ETA 0:09\r\n")
        progress.begin_step(2)
        progress.begin_phase("gen")
        screen.wait_for(r"\r\x1b\[Kstep 2/2  rollout \d+s")
        progress.abandon_step()
        progress.close()
    screen.wait_closed()
    # What is left on the screen: of each terminal line the part after the last erase.
    left = [line.split("\r\x1b[K")[-1].rstrip("\r") for line in screen.raw.split("\n")]
    assert left == [step_line(1, METRICS, total_steps=2, mean_seconds=8.7), ""]
