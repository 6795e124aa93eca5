"""Runs of the program on two data-parallel ranks: one sums gradients during the backward pass, one after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vppo.observability.metrics import read_metrics
from tests.proofs.runs import SHORT, exported, train

TWO_RANKS = (
    *(setting for setting in SHORT if "pipeline" not in setting),
    "parallel.data_parallel_size=2", "actor.ppo_epochs=2", "trainer.total_steps=2",
    "actor.micro_batch_size_per_device_for_update=4",
)  # fmt: skip
"""Two steps, each of two mini-batches that are trained on twice, in several micro-batches; a checkpoint at the end."""


@pytest.mark.slow
@pytest.mark.extended
def test_overlap_changes_no_bit_of_a_run(digits: Path, tmp_path: Path) -> None:
    after, during = (
        train(digits, tmp_path, name, *TWO_RANKS, f"parallel.overlap_grad_reduce={overlap}")
        for name, overlap in (("after", "false"), ("during", "true"))
    )
    weights = [exported(run, 2) for run in (after, during)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    numbers = [
        [{name: line[name] for name in ("actor/pg_loss", "actor/grad_norm")} for line in read_metrics(run)]
        for run in (after, during)
    ]
    assert len(numbers[0]) == 2 and numbers[0] == numbers[1]
