"""A run that cannot work ends before an engine is started, whoever has started its ranks; and the folder of one that
goes on.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vppo.config.schema import DataConfig, ModelConfig, RolloutConfig, RunConfig, TrainerConfig
from megatron_vppo.observability.validations import VALIDATIONS, ValidationRecords
from megatron_vppo.parallel.layout import destroy_layout
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.setup.world import world_of_one
from megatron_vppo.trainer.checkpointer import ResumePoint
from megatron_vppo.trainer.run import _open_log, run_training
from tests.models.whole import save_whole_folder


@pytest.mark.parametrize(
    ("top_k", "weights", "message"),
    [
        (300, "model.safetensors", r"rollout\.top_k 300 is more than the 109 tokens"),
        (-1, "other.safetensors", "holds no weights"),
    ],
)
def test_ranks_refuse_what_cannot_work(top_k: int, weights: str, message: str, tmp_path: Path) -> None:
    save_whole_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / weights)
    (tmp_path / "rows.jsonl").touch()
    config = RunConfig(
        data=DataConfig(train_files=str(tmp_path / "rows.jsonl"), max_prompt_length=300, max_response_length=20),
        model=ModelConfig(path=str(tmp_path / "model")),
        rollout=RolloutConfig(top_k=top_k),
        trainer=TrainerConfig(runs_dir=str(tmp_path / "runs")),
    )
    unused: Any = None  # the run ends before it
    try:
        with pytest.raises(ValueError, match=message):
            run_training(config, world_of_one(), say=print, signals=unused)
    finally:
        destroy_layout()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("resumed", "kept"),
    [
        (ResumePoint(0), []),
        (ResumePoint(5), [0, 5]),
        (ResumePoint(5, unfinished_step={"values": {}, "seconds": 0.0}), [0]),  # it is validated again
    ],
)
def test_validations_after_the_loaded_step_are_cut(resumed: ResumePoint, kept: list[int], tmp_path: Path) -> None:
    config = RunConfig(
        data=DataConfig(train_files="x"), model=ModelConfig(path="y"), trainer=TrainerConfig(runs_dir=str(tmp_path))
    )
    folder = RunFolder.of(config.trainer)
    for step in (0, 5, 10):
        ValidationRecords([]).write(folder.root, step)
    layout: Any = SimpleNamespace(rank=0, world_size=1)
    _open_log(config, layout, folder, resumed, total_steps=20).close()
    assert VALIDATIONS.steps(folder.root) == kept
