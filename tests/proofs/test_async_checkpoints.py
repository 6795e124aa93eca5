"""A run that writes its checkpoints while it goes on, by the program: same weights, and another run goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.parallel.checkpoint_folder import check_whole, checkpoint_steps
from tests.proofs.runs import SHORT, exported, train


@pytest.mark.slow
@pytest.mark.extended
def test_the_program_writes_them_while_it_goes_on(digits: Path, tmp_path: Path) -> None:
    settings = (*SHORT, "trainer.total_steps=2", "trainer.save_freq=1", "trainer.save_limit=-1")
    waited = train(digits, tmp_path, "waited", *settings)
    went_on = train(digits, tmp_path, "went_on", *settings, "trainer.async_checkpoints=true")
    for run in (waited, went_on):
        assert checkpoint_steps(run / "checkpoints") == [1, 2]
        assert [check_whole(run / "checkpoints", step)["step"] for step in (1, 2)] == [1, 2]
        assert not list((run / "checkpoints").glob(".*"))
    expected, found = exported(waited, 2), exported(went_on, 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    given = went_on / "checkpoints" / "global_step_1"
    resumed = train(digits, tmp_path, "resumed", *settings, f"trainer.load_checkpoint_path={given}")
    assert [line["step"] for line in read_metrics(resumed)] == [2]
    assert all(torch.equal(exported(resumed, 2)[name], tensor) for name, tensor in expected.items())
