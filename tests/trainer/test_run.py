"""A run that cannot work ends before an engine is started, whoever has started its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vppo.config.schema import DataConfig, ModelConfig, RolloutConfig, RunConfig, TrainerConfig
from megatron_vppo.parallel.layout import destroy_layout
from megatron_vppo.trainer.run import run_training
from tests.models.whole import save_whole_folder


def test_ranks_refuse_what_an_engine_would(tmp_path: Path) -> None:
    save_whole_folder(tmp_path / "model")
    config = RunConfig(
        data=DataConfig(train_files="x", max_prompt_length=300, max_response_length=20),
        model=ModelConfig(path=str(tmp_path / "model")),
        rollout=RolloutConfig(top_k=300),
        trainer=TrainerConfig(runs_dir=str(tmp_path / "runs")),
    )
    try:
        with pytest.raises(ValueError, match=r"rollout\.top_k 300 is more than the 109 tokens"):
            run_training(config, say=print)
    finally:
        destroy_layout()
    assert not (tmp_path / "runs").exists()
