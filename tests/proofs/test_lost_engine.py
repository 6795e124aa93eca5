"""An engine that dies, and one that hangs, in the middle of sampling: the run goes on, and no number of it changes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megatron_vppo.observability.metrics import read_metrics
from tests.proofs.runs import ROOT, SHORT, VPPO, exported, train, train_arguments
from tests.system.marked import parent_of, processes_with, wait_until_gone

SECONDS = re.compile(r"timing_s/|perf/|rollout/engine_restarts$|time$")
"""Metrics that two runs of the same numbers do not share."""


@pytest.mark.slow
@pytest.mark.extended
def test_engines_that_die_or_hang_change_nothing(digits: Path, tmp_path: Path) -> None:
    """A stopped engine takes no request: the trainer waits for it. It is then killed in step 2, and left so in 3."""
    straight = train(digits, tmp_path, "straight", *SHORT)

    mark = f"mark of {tmp_path}"
    arguments = train_arguments(digits, tmp_path, "disturbed", *SHORT, "rollout.engine_timeout_seconds=60")
    with subprocess.Popen(
        [*VPPO, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "VPPO_TEST_MARK": mark},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lost = []
        for line in process.stdout:
            if line.startswith(("step 1/", "step 2/")):
                lost.append(engine_of(mark))
                os.kill(lost[-1], signal.SIGSTOP)
            if line.startswith("step 1/"):
                time.sleep(3)
                os.kill(lost[-1], signal.SIGKILL)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    killed, hung = [line for line in errors.splitlines() if "is started again" in line]
    log = r"\(log: \S+/disturbed/logs/attempt_1/engine_0.log\)"
    again = r"rollout engine 0 is started again \({} of at most 3 times\): the rollout engine \(process {}\) "
    assert re.fullmatch(again.format(1, lost[0]) + r"ended with signal SIGKILL " + log, killed)
    silence = r"made no progress for 60 seconds \(rollout.engine_timeout_seconds\) "
    assert re.fullmatch(again.format(2, lost[1]) + silence + log, hung)
    wait_until_gone(mark)

    disturbed = tmp_path / "digits_cpu" / "disturbed"
    expected, found = ([numbers(line) for line in read_metrics(run)] for run in (straight, disturbed))
    assert found == expected
    assert [line["rollout/engine_restarts"] for line in read_metrics(disturbed)] == [0, 1, 1, 0]
    first, second = exported(straight, 4), exported(disturbed, 4)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for step in range(1, 5):
        name = f"rollouts/step_{step}.jsonl.zst"
        assert (straight / name).read_bytes() == (disturbed / name).read_bytes()


def numbers(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if not SECONDS.search(name)}


def engine_of(mark: str) -> int:
    """The process of the run's engine; vLLM and its watchdog are forked from it."""
    found = [pid for pid, command in processes_with(mark).items() if "rollout.engine_process\0" in command]
    (engine,) = [pid for pid in found if parent_of(pid) not in found]
    return engine
