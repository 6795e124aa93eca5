"""The same program with a Qwen3-VL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint
from safetensors.torch import load_file

from megatron_vppo.observability.metrics import read_metrics
from tests.end_to_end.runs import ROLLOUT_DIFFERENCE, SHORT, check_export, exported, train


@pytest.mark.slow
@pytest.mark.extended
def test_a_qwen3_vl_runs_too(digits: Path, tmp_path: Path) -> None:
    """Over two pipeline stages, each of which leads an engine: that they hold the same model, and that it exports."""
    processor = make_processor("qwen3-vl")
    start = tmp_path / "start"
    save_checkpoint(make_model(make_config(processor.tokenizer, "qwen3-vl"), seed=1), processor, start)
    run = train(
        digits, tmp_path, "qwen3", *SHORT, f"model.path={start}", "trainer.total_steps=2", "data.max_pixels=16384",
        "rollout.num_engines=2",
    )  # fmt: skip
    lines = [line for line in read_metrics(run) if "actor/loss" in line]
    assert len(lines) == 2 and all(line["weight_sync/checksums_ok"] == 1.0 for line in lines)
    assert all(line["training/rollout_logp_diff_max"] < ROLLOUT_DIFFERENCE for line in lines)
    assert all(line["actor/grad_norm"] > 0 for line in lines)
    before, after = load_file(start / "model.safetensors"), exported(run, 2)
    assert before.keys() == after.keys()
    tower = "model.visual.deepstack_merger_list.0.linear_fc1.weight"
    assert not torch.equal(before[tower], after[tower])
    check_export(run / "huggingface" / "step_2", tmp_path)
