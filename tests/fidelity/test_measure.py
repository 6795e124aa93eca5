"""The FP8 recipes that `vppo fp8-fidelity` measures, by settings and machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vppo.config.choices import Fp8Recipe
from megatron_vppo.config.schema import DataConfig, Fp8Config, ModelConfig, RolloutConfig, RunConfig
from megatron_vppo.fidelity.measure import measure_fidelity, refusal
from tests.models.whole import save_whole_folder


def config(ends: int) -> RunConfig:
    return RunConfig(
        data=DataConfig(train_files="x"), model=ModelConfig(path="x"), fp8=Fp8Config(bf16_layers_at_ends=ends)
    )


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed", "mxfp8"])
def test_everything_can_be_emulated_but_delayed_with_ends(recipe: Fp8Recipe) -> None:
    assert refusal(recipe, config(0), on_gpu=False) is None
    reason = refusal(recipe, config(1), on_gpu=False)
    assert reason is None if recipe != "delayed" else "bf16_layers_at_ends" in (reason or "")


def test_delayed_has_no_scales_to_take_on_a_gpu() -> None:
    assert "scales from past updates" in (refusal("delayed", config(0), on_gpu=True) or "")


def test_what_an_engine_would_refuse_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    save_whole_folder(tmp_path)
    asked = RunConfig(
        data=DataConfig(train_files="x", max_prompt_length=300, max_response_length=20),
        model=ModelConfig(path=str(tmp_path)),
        rollout=RolloutConfig(top_k=300),
    )
    with pytest.raises(ValueError, match=r"rollout\.top_k 300 is more than the 109 tokens"):
        measure_fidelity(asked, recipes=["blockwise"], num_prompts=1, folder=tmp_path / "out")
    assert not dist.is_initialized()
    assert not (tmp_path / "out").exists()
