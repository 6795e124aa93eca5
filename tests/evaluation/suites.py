"""A suite of small image questions on disk, its settings, and recorded responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from megatron_vppo.evaluation.inputs import EvalInputs, open_benchmarks
from megatron_vppo.evaluation.responses import ResponseFile, ResponseRecord, response_path
from megatron_vppo.evaluation.settings import EvalConfig, load_suite
from megatron_vppo.models.model_files import open_without_weights
from tests.rollout.tiny_model import save_model_folder

SETTINGS: dict[str, Any] = {
    "data": {"max_prompt_length": 120, "max_response_length": 8, "min_pixels": 3136, "max_pixels": 12544},
    "rollout": {"n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "cpu_kv_cache_gib": 0.125, "max_num_seqs": 16},
    "reward": {"num_workers": 1},
}


def write_rows(folder: Path, name: str = "one", *, count: int = 3) -> Path:
    """Writes `count` questions with an image each, whose answers are their numbers."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(name))
    lines = []
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(folder / f"{name}_{number}.png")
        row = {"problem": f"<image>Which? {number}", "answer": str(number), "images": [f"{name}_{number}.png"]}
        lines.append(json.dumps(row))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_suite(folder: Path, *names: str, **changes: Any) -> Path:
    """Writes the file of a suite with a benchmark of three questions for each name."""
    benchmarks = [
        {"name": name, "source": "rows", "path": str(write_rows(folder, name)), "grader": "mathruler"} for name in names
    ]
    suite = folder / "suite.yaml"
    suite.write_text(yaml.safe_dump({**SETTINGS, "benchmarks": benchmarks, **changes}))
    return suite


def tiny_model(folder: Path) -> Path:
    """Saves a random Qwen2.5-VL, one token per byte."""
    return save_model_folder(folder, tied=True)


def processor_folder(folder: Path) -> Path:
    """Saves a model's folder without its weights, which takes less time."""
    tiny_model(folder)
    (folder / "model.safetensors").unlink()
    return folder


def opened(folder: Path, *names: str, **changes: Any) -> tuple[EvalConfig, EvalInputs]:
    config = load_suite(write_suite(folder, *names, **changes))
    return config, open_benchmarks(config, open_without_weights(processor_folder(folder / "model")))


def record(question: str, digest: str, sample: int, accuracy: float, **other: Any) -> ResponseRecord:
    made: dict[str, Any] = {
        "question": question, "digest": digest, "sample": sample, "response": "\\boxed{1}", "accuracy": accuracy,
        "vote": "1", "error": None, "finish_reason": "stop", "tokens": ["\\boxed", "{1}", "<|im_end|>"],
        "logps": [-0.5, -1.25, 0.0], **other,
    }  # fmt: skip
    return ResponseRecord(**made)  # type: ignore[typeddict-item]


def write_records(out: Path, benchmark: str, records: list[ResponseRecord]) -> Path:
    path = response_path(out, benchmark)
    file = ResponseFile(path)
    for one in records:
        file.add(one)
    file.close()
    return path
