"""The whole program on real components: `vppo train` with Megatron Core over gloo, vLLM on CPU, real images."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from digits.checkpoint import make_config, make_model, make_processor, save_checkpoint
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vppo.observability.metrics import read_metrics
from megatron_vppo.observability.rollouts import read_rollouts, rollout_path
from megatron_vppo.rollout.engine import RolloutEngine
from megatron_vppo.rollout.records import EngineSettings, SampleRequest, SamplingSettings

ROOT = Path(__file__).parents[2]
LEARNING_STEPS = 5
LEARNED_POINTS = 0.20
"""Rise of held-out accuracy by a reward that is easy to learn (rewards.py); the demo shows that seeing is learned."""
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


def command(digits: Path, runs: Path, name: str, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "megatron_vppo.cli.main", "train", "--config", "examples/digits_cpu/config.yaml",
        f"data.train_files={digits}/data/train.parquet", f"data.val_files={digits}/data/val.parquet",
        f"model.path={digits}/model", f"trainer.runs_dir={runs}", f"trainer.experiment_name={name}", *overrides,
    ]  # fmt: skip


def train(digits: Path, runs: Path, name: str, *overrides: str) -> Path:
    """A whole run; returns its folder."""
    done = subprocess.run(command(digits, runs, name, *overrides), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return runs / "digits_cpu" / name


def exported(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "huggingface" / f"step_{step}" / "model.safetensors")


@pytest.mark.slow
def test_reward_rises_and_engines_hold_the_trainers_weights(digits: Path, tmp_path: Path) -> None:
    run = train(
        digits, tmp_path, "learns", f"trainer.total_steps={LEARNING_STEPS}", "trainer.save_freq=-1",
        "reward.reward_function=tests/end_to_end/rewards.py:starts_small", "data.max_response_length=8",
        "actor.optim.lr=1e-3", "data.max_val_rows=256",
    )  # fmt: skip
    lines = read_metrics(run)
    accuracy = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    assert accuracy[-1] - accuracy[0] >= LEARNED_POINTS, accuracy
    trained = [line for line in lines if "actor/pg_loss" in line]
    assert len(trained) == LEARNING_STEPS
    assert max(line["training/rollout_logp_diff_max"] for line in trained) < ROLLOUT_DIFFERENCE
    assert all(line["weight_sync/checksums_ok"] == 1.0 for line in trained)
    assert all(line["actor/grad_norm"] > 0 and line["critic/score/max"] == 1.0 for line in trained), "a dead run"
    _check_names_of_metrics(lines)
    first = trained[0]
    assert first["actor/perception_token_fraction"] == pytest.approx(4 / 8, abs=0.02), "ceil(0.4 x 8) of 8 tokens"
    assert first["actor/low_var_kl_mean_selected"] > 2 * first["actor/low_var_kl_mean_rejected"] > 0
    assert (run / "report.html").stat().st_size > 50_000
    pictured = [record for record in read_rollouts(rollout_path(run, LEARNING_STEPS)) if "images" in record]
    assert {record["accuracy"] for record in pictured} == {0.0, 1.0}, "right and wrong answers keep their pictures"
    _check_export(run / "huggingface" / f"step_{LEARNING_STEPS}", tmp_path)


def _check_names_of_metrics(lines: list[dict[str, float]]) -> None:
    """The run logs what docs/metrics.md lists, and nothing else."""
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    documented: set[str] = set()
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row.split("|")[1])
        documented.add(first)
        for ending in others:  # a whole name, or `/max` or `_max` in place of the first one's last part
            whole = not ending.startswith(("/", "_"))
            documented.add(ending if whole else first.rpartition(ending[0])[0] + ending)
    logged = {name for line in lines for name in line} - {"step", "time"}
    placeholders = {"timing_s/...", ".../max", "..._max", ".../min", "..._min", "reward/<name>"}
    assert logged <= documented, logged - documented
    assert documented - logged - placeholders == {"actor/rollout_correction_mean"}


def _check_export(folder: Path, scratch: Path) -> None:
    """transformers and vLLM load the exported folder as it is, and agree on what it says."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (112, 56), (200, 30, 90))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the sum?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    compact = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    settings = EngineSettings(model=str(folder), max_model_len=96, dtype="float32", cpu_kv_cache_gib=0.25)
    with RolloutEngine(settings, log_path=scratch / "engine.log") as engine:
        engine.wait_ready(timeout_seconds=300)
        request = SampleRequest(token_ids=tuple(compact), images=(picture,), seeds=(7,))
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


@pytest.mark.slow
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
    _check_export(run / "huggingface" / "step_2", tmp_path)


@pytest.mark.slow
def test_killed_run_ends_with_the_weights_of_one_never_killed(digits: Path, tmp_path: Path) -> None:
    """SIGKILL to the launcher and all ranks in the middle of step 3; started again, on two pipeline stages.

    One starts from the Hugging Face folder, the other from what `vppo convert` made of it, and its last checkpoint
    converts to what it exported.
    """
    straight = train(digits, tmp_path, "straight", *SHORT)
    killed = tmp_path / "digits_cpu" / "killed"
    vppo("convert", "hf-to-megatron", digits / "model", tmp_path / "converted")
    settings = (*SHORT, f"model.path={tmp_path / 'converted'}")
    mark = f"mark of {tmp_path}"
    with subprocess.Popen(
        command(digits, tmp_path, "killed", *settings), cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "VPPO_TEST_MARK": mark},
    ) as process:  # fmt: skip
        _wait_for_checkpoint(killed / "checkpoints" / "global_step_2", process)
        time.sleep(0.3)
        assert len(_processes_with(mark)) >= 4, "torchrun, two ranks and an engine at least"
        os.killpg(process.pid, signal.SIGKILL)
    _wait_until_gone(mark)
    assert (killed / "checkpoints" / "global_step_2" / "trainer_state.json").is_file()
    assert not (killed / "huggingface").exists()
    train(digits, tmp_path, "killed", *settings)

    expected, found = exported(straight, 4), exported(killed, 4)
    start = load_file(digits / "model" / "model.safetensors")
    assert expected.keys() == found.keys() == start.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(not torch.equal(expected[name], start[name]) for name in expected), "a weight that was never trained"
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert sorted(path.name for path in (killed / "checkpoints").glob("global_step_*")) == ["global_step_4"]
    checkpoint, back = killed / "checkpoints" / "global_step_4", tmp_path / "back"
    vppo("convert", "megatron-to-hf", checkpoint, back, "--source", digits / "model")
    converted = load_file(back / "model.safetensors")
    assert converted.keys() == found.keys() and all(torch.equal(converted[name], found[name]) for name in found)
    assert {path.name for path in back.iterdir()} == {path.name for path in (killed / "huggingface/step_4").iterdir()}


def vppo(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vppo.cli.main", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def _wait_for_checkpoint(folder: Path, process: subprocess.Popen[bytes], timeout_seconds: float = 900) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not folder.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.05)


def _wait_until_gone(mark: str, timeout_seconds: float = 20) -> None:
    """Until nothing that inherited `mark` in its environment is left: ranks, engine, workers, their helpers."""
    deadline = time.monotonic() + timeout_seconds
    while (left := _processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"left behind: {left}"


def _processes_with(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(f"{folder.name}: {(folder / 'cmdline').read_bytes().decode()[:100]}")
        except OSError:  # gone meanwhile
            continue
    return found
