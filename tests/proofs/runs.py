"""Runs of the real program for these tests: its commands, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import SampleRequest, SamplingSettings
from tests.rollout.settings import engine_settings

ROOT = Path(__file__).parents[2]
VPPO = (sys.executable, "-m", "megatron_vppo.cli.main")
ROLLOUT_DIFFERENCE = 1e-4
"""Nats, of any token of the run: trainer against vLLM, both float32."""
EXPORT_DIFFERENCE = 1e-5

SHORT = (
    "data.rollout_batch_size=8", "actor.global_batch_size=4", "rollout.n=4", "algorithm.online_filtering=false",
    "trainer.total_steps=4", "trainer.save_freq=2", "trainer.val_before_train=false", "trainer.val_freq=-1",
    "data.max_val_rows=8", "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2",
    "rollout.cpu_kv_cache_gib=0.125",
)  # fmt: skip
"""Two pipeline stages, one engine."""
LEARNING_STEPS = 5
LEARNED_POINTS = 0.20
"""Rise of held-out accuracy by a reward that is easy to learn (rewards.py); the demo shows that seeing is learned."""
LEARNING = (
    f"trainer.total_steps={LEARNING_STEPS}", "trainer.save_freq=-1",
    "reward.reward_function=tests/proofs/rewards.py:starts_small", "data.max_response_length=8",
    "actor.optim.lr=1e-3", "data.max_val_rows=256",
)  # fmt: skip


def train_arguments(digits: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    return [
        "train", "--config", "examples/digits_cpu/config.yaml",
        f"data.train_files={digits}/data/train.parquet", f"data.val_files={digits}/data/val.parquet",
        f"model.path={digits}/model", f"trainer.runs_dir={runs}", f"trainer.experiment_name={name}", *overrides,
    ]  # fmt: skip


def train(digits: Path, runs: Path, name: str, *overrides: str) -> Path:
    """A whole run; returns its folder."""
    vppo(*train_arguments(digits, runs, name, *overrides))
    return runs / "digits_cpu" / name


def check_learned(run: Path) -> list[dict[str, float]]:
    """Checks that a run with LEARNING learned and engines had the trainer's weights; returns its training lines."""
    lines = read_metrics(run)
    accuracy = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    assert accuracy[-1] - accuracy[0] >= LEARNED_POINTS, accuracy
    trained = [line for line in lines if "actor/pg_loss" in line]
    assert len(trained) == LEARNING_STEPS
    assert max(line["training/rollout_logp_diff_max"] for line in trained) < ROLLOUT_DIFFERENCE
    assert all(line["weight_sync/checksums_ok"] == 1.0 for line in trained)
    return trained


def exported(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "huggingface" / f"step_{step}" / "model.safetensors")


def vppo(*arguments: object) -> str:
    """Runs a command, which must succeed, and returns its output."""
    done = subprocess.run([*VPPO, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def check_export(folder: Path, scratch: Path) -> None:
    """transformers and vLLM load the exported folder as it is, and agree on what it says."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (112, 56), (200, 30, 90))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the sum?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    compact = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    settings = engine_settings(model=str(folder), max_model_len=96, dtype="float32", cpu_kv_cache_gib=0.25)
    with RolloutEngine(settings, log_path=scratch / "engine.log") as engine:
        engine.wait_ready(timeout_seconds=300)
        request = SampleRequest(token_ids=tuple(compact), images=(image,), seeds=(7,))
        ((completion,),) = engine.generate([request], SamplingSettings(max_tokens=8))
    ids = torch.cat([inputs["input_ids"][0], torch.tensor(completion.token_ids)])[None]
    types = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(
            input_ids=ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=types,
        ).logits[0, -len(completion.token_ids) - 1 : -1]  # fmt: skip
    logps = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert (logps - torch.tensor(completion.logps)).abs().max() < EXPORT_DIFFERENCE
