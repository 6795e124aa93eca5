"""A run that fails: one message on the terminal, the rest in logs/."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.proofs.runs import ROOT, SHORT, VPPO, train_arguments
from tests.system.marked import parent_of, processes_with, wait_until_gone

FAST = (*SHORT, "rollout.n=2", "data.max_response_length=4", "trainer.save_freq=-1")


@pytest.mark.extended
@pytest.mark.slow
def test_the_user_reads_one_message(digits: Path, tmp_path: Path) -> None:
    """First the engine is killed after a step; then, in the same folder, the reward function cannot be loaded."""
    mark = f"mark of {tmp_path}"
    arguments = train_arguments(digits, tmp_path, "fails", *FAST, "rollout.max_engine_restarts=0")
    logs = tmp_path / "digits_cpu" / "fails" / "logs" / "attempt_1"
    with subprocess.Popen(
        [*VPPO, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "VPPO_TEST_MARK": mark},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step 1/"):
            assert process.poll() is None, process.stderr and process.stderr.read()
        found = [pid for pid, command in processes_with(mark).items() if "rollout.engine_process\0" in command]
        (engine,) = [pid for pid in found if parent_of(pid) not in found]  # vLLM forks it
        os.kill(engine, signal.SIGKILL)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.fullmatch(
        rf"vppo: rank 0: the rollout engine \(process {engine}\) ended with signal SIGKILL; "
        rf"end of {logs}/engine_0.log:\n(  \| .*\n)+\(traceback: {logs}/trainer_rank_0.log\)\n",
        error,
    )
    wait_until_gone(mark)

    done = subprocess.run(
        [*VPPO, *arguments, "reward.reward_function=tests/proofs/rewards.py:no_such_function"], cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("vppo: rank 0: the reward function cannot be loaded:\n")
    assert done.stderr.count("vppo: ") == 1
    again = logs.with_name("attempt_2")
    assert done.stderr.endswith(f"(traceback: {again}/trainer_rank_0.log)\n")
    assert (logs / "trainer_rank_0.log").read_text().count("RuntimeError: the rollout engine") == 1
    assert (again / "trainer_rank_0.log").read_text().count("ValueError: the reward function") == 1
