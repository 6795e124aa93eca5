"""Training from a converted folder, and conversion of a training checkpoint, by the real commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vppo.observability.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "data.rollout_batch_size=8", "actor.global_batch_size=8", "rollout.n=4", "algorithm.online_filtering=false",
    "trainer.total_steps=1", "trainer.save_freq=1", "trainer.val_before_train=false", "trainer.val_freq=-1",
    "data.max_val_rows=8", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1",
    "rollout.cpu_kv_cache_gib=0.125",
)  # fmt: skip


def vppo(*arguments: object) -> str:
    command = [sys.executable, "-m", "megatron_vppo.cli.main", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def train(digits: Path, runs: Path, model: Path) -> Path:
    data = (f"data.train_files={digits}/data/train.parquet", f"data.val_files={digits}/data/val.parquet")
    vppo(
        "train", "--config", "examples/digits_cpu/config.yaml", *data, *SETTINGS, f"model.path={model}",
        f"trainer.runs_dir={runs}", f"trainer.experiment_name={model.name}",
    )  # fmt: skip
    return runs / "digits_cpu" / model.name


@pytest.mark.slow
def test_a_run_from_a_converted_folder_equals_one_from_the_hf_folder(digits: Path, tmp_path: Path) -> None:
    """Every answer and every bit of the trained weights. The checkpoint of two ranks becomes what the run exported."""
    start = digits / "model"
    vppo("convert", "hf-to-megatron", start, tmp_path / "converted")
    from_hf, from_converted = (train(digits, tmp_path, model) for model in (start, tmp_path / "converted"))

    before, expected, found = (
        load_file(folder / "model.safetensors")
        for folder in (start, from_hf / "huggingface/step_1", from_converted / "huggingface/step_1")
    )
    assert expected.keys() == found.keys() == before.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(expected[name], before[name]) for name in expected), "nothing was trained"
    (ours,), (theirs,) = read_metrics(from_hf), read_metrics(from_converted)
    assert all(theirs[name] == ours[name] for name in ("actor/pg_loss", "actor/grad_norm", "critic/score/mean"))

    checkpoint = from_converted / "checkpoints/global_step_1"
    vppo("convert", "megatron-to-hf", checkpoint, tmp_path / "back", "--source", start)
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == found.keys() and all(torch.equal(back[name], found[name]) for name in found)
    exported = {path.name for path in (from_converted / "huggingface/step_1").iterdir()}
    assert exported == {path.name for path in (tmp_path / "back").iterdir()}
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "qwen2_5_vl"


@pytest.mark.slow
def test_logprobs_agree_through_all_three_engines(digits: Path, tmp_path: Path) -> None:
    vppo("convert", "hf-to-megatron", digits / "model", tmp_path / "converted")
    printed = vppo("convert", "verify", digits / "model", tmp_path / "converted", "--vllm")
    for engines in ("Megatron - transformers", "vLLM - transformers", "vLLM - Megatron"):
        assert printed.count(engines) == 2, printed
    assert "tolerance 1e-04" in printed
