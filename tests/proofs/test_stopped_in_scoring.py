"""A run that is asked to stop in the middle of scoring, and goes on: no number of it changes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_vppo.observability.metrics import read_metrics
from tests.proofs.runs import ROOT, SHORT, VPPO, exported, train, train_arguments
from tests.proofs.test_lost_engine import numbers

SETTINGS = (
    *SHORT, "trainer.total_steps=3", "trainer.save_freq=-1", "actor.micro_batch_size_per_device_for_experience=4",
)  # fmt: skip
"""Eight micro-batches a step. Nothing is saved but on request and at the end."""
IN_STEP_2 = 6
"""The number of a chunk of scoring. Each step has four, of two micro-batches for two stages."""
ASKED = Path(__file__).parent / "asked_in_scoring"


@pytest.mark.slow
@pytest.mark.extended
def test_run_stopped_in_scoring_ends_with_the_numbers_of_one_never_stopped(digits: Path, tmp_path: Path) -> None:
    straight = train(digits, tmp_path, "straight", *SETTINGS)
    chunks = tmp_path / "chunks"
    chunks.mkdir()
    arguments = train_arguments(digits, tmp_path, "stopped", *SETTINGS)
    path = os.pathsep.join([str(ASKED), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*VPPO, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "VPPO_TEST_CHUNKS": str(chunks), "VPPO_TEST_CHUNK": str(IN_STEP_2)},
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert [(chunks / f"rank_{rank}").read_text() for rank in (0, 1)] == ["chunk\n" * IN_STEP_2] * 2
    stopped = tmp_path / "digits_cpu" / "stopped"
    assert [path.name for path in (stopped / "checkpoints").glob("global_step_*")] == ["global_step_1"]
    assert [line["step"] for line in read_metrics(stopped)] == [1]

    train(digits, tmp_path, "stopped", *SETTINGS)
    expected, found = ([numbers(line) for line in read_metrics(run)] for run in (straight, stopped))
    assert [line["step"] for line in found] == [1, 2, 3] and found == expected
    first, second = exported(straight, 3), exported(stopped, 3)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for step in (1, 2, 3):
        name = f"rollouts/step_{step}.jsonl.zst"
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()
