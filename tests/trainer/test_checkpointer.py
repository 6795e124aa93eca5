"""The checkpoint that a run goes on from. What a checkpoint holds is shown in tests/parallel and tests/proofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import TrainerConfig
from megatron_vppo.parallel.checkpoint import STATE
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.trainer.checkpointer import Checkpointer


def checkpointer(folder: Path, *, resume: bool) -> Checkpointer:
    config = TrainerConfig(runs_dir=str(folder), project_name="p", experiment_name="e", resume=resume)
    unused: Any = None  # nothing is loaded
    return Checkpointer(config, RunFolder.of(config), layout=unused, trainable=unused, stream=None)


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_run_starts_at_step_zero(tmp_path: Path, resume: bool) -> None:
    with single_rank():
        assert checkpointer(tmp_path, resume=resume).resume() == 0


def test_a_run_that_must_not_go_on_names_its_checkpoint(tmp_path: Path) -> None:
    whole = tmp_path / "p" / "e" / "checkpoints" / "global_step_4"
    whole.mkdir(parents=True)
    (whole / STATE).write_text("{}")
    with single_rank(), pytest.raises(ValueError, match=r"trainer\.resume=false, but .*p/e holds .* step 4"):
        checkpointer(tmp_path, resume=False).resume()
