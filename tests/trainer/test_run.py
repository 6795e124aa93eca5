"""A run that cannot work ends before an engine is started, whoever has started its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vppo.config.schema import DataConfig, ModelConfig, RolloutConfig, RunConfig, TrainerConfig
from megatron_vppo.parallel.layout import destroy_layout
from megatron_vppo.setup.world import world_of_one
from megatron_vppo.trainer.run import run_training
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
