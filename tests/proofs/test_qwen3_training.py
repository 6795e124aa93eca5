"""The same program with a Qwen3-VL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint
from safetensors.torch import load_file

from megatron_vppo.observability.metrics import read_metrics
from tests.proofs.runs import (
    LEARNING,
    ROLLOUT_DIFFERENCE,
    SHORT,
    check_export,
    check_learned,
    exported,
    train,
)

PIXELS = "data.max_pixels=16384"
"""128 x 128: sides are multiples of 32 here."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "start"
    processor = make_processor("qwen3-vl")
    save_checkpoint(make_model(make_config(processor.tokenizer, "qwen3-vl"), seed=1), processor, folder)
    return folder


@pytest.mark.slow
@pytest.mark.extended
def test_a_frozen_tower_is_sent_once_and_stays(digits: Path, start: Path, tmp_path: Path) -> None:
    """Over two pipeline stages, each of which leads an engine: that they hold the same model, and that it exports."""
    run = train(
        digits, tmp_path, "qwen3", *SHORT, PIXELS, f"model.path={start}", "model.freeze=[vision_tower]",
        "trainer.total_steps=2", "rollout.num_engines=2",
    )  # fmt: skip
    lines = [line for line in read_metrics(run) if "actor/loss" in line]
    assert len(lines) == 2 and all(line["weight_sync/checksums_ok"] == 1.0 for line in lines)
    assert all(line["training/rollout_logp_diff_max"] < ROLLOUT_DIFFERENCE for line in lines)
    assert all(line["actor/grad_norm"] > 0 for line in lines)
    before, after = load_file(start / "model.safetensors"), exported(run, 2)
    assert before.keys() == after.keys()
    tower = {name for name in before if ".visual." in name and "merger" not in name}
    assert tower and {name for name in before if torch.equal(before[name], after[name])} == tower
    trained = sum(tensor.nbytes for name, tensor in before.items() if name not in tower)
    everything = sum(tensor.nbytes for tensor in before.values())
    assert [line["weight_sync/bytes"] for line in lines] == [(everything + trained) / 2, trained]
    check_export(run / "huggingface" / "step_2", tmp_path)


@pytest.mark.slow
@pytest.mark.extended
def test_reward_rises(digits: Path, start: Path, tmp_path: Path) -> None:
    """Each answer's tokens shared by two ranks."""
    run = train(
        digits, tmp_path, "qwen3_learns", *LEARNING, PIXELS, f"model.path={start}",
        "parallel.tensor_model_parallel_size=1", "parallel.context_parallel_size=2",
    )  # fmt: skip
    check_learned(run)
