"""A run that is killed, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.proofs.runs import ROOT, SHORT, VPPO, exported, train, train_arguments, vppo
from tests.system.marked import processes_with, wait_until_gone


@pytest.mark.slow
@pytest.mark.extended
def test_killed_run_ends_with_the_weights_of_one_never_killed(digits: Path, tmp_path: Path) -> None:
    """SIGKILL to the launcher and all ranks in the middle of step 3; started again, on two pipeline stages.

    One starts from the Hugging Face folder, the other from what `vppo convert` made of it, and its last checkpoint
    converts to what it exported.
    """
    straight = train(digits, tmp_path, "straight", *SHORT)
    killed = tmp_path / "digits_cpu" / "killed"
    vppo("convert", "hf-to-megatron", digits / "model", tmp_path / "converted")
    settings = (*SHORT, f"model.path={tmp_path / 'converted'}")
    mark = f"mark of {tmp_path}"
    with subprocess.Popen(
        [*VPPO, *train_arguments(digits, tmp_path, "killed", *settings)], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "VPPO_TEST_MARK": mark},
    ) as process:  # fmt: skip
        _wait_for_checkpoint(killed / "checkpoints" / "global_step_2", process)
        time.sleep(0.3)
        assert len(processes_with(mark)) >= 4, "the launcher, two ranks and an engine at least"
        os.killpg(process.pid, signal.SIGKILL)
    wait_until_gone(mark)
    assert (killed / "checkpoints" / "global_step_2" / "trainer_state.json").is_file()
    assert not (killed / "huggingface").exists()
    train(digits, tmp_path, "killed", *settings)

    expected, found = exported(straight, 4), exported(killed, 4)
    start = load_file(digits / "model" / "model.safetensors")
    assert expected.keys() == found.keys() == start.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(not torch.equal(expected[name], start[name]) for name in expected), "a weight that was never trained"
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert sorted(path.name for path in (killed / "checkpoints").glob("global_step_*")) == ["global_step_4"]
    checkpoint, back = killed / "checkpoints" / "global_step_4", tmp_path / "back"
    vppo("convert", "megatron-to-hf", checkpoint, back, "--source", digits / "model")
    converted = load_file(back / "model.safetensors")
    assert converted.keys() == found.keys() and all(torch.equal(converted[name], found[name]) for name in found)
    assert {path.name for path in back.iterdir()} == {path.name for path in (killed / "huggingface/step_4").iterdir()}


def _wait_for_checkpoint(folder: Path, process: subprocess.Popen[bytes], timeout_seconds: float = 900) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not folder.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.05)
