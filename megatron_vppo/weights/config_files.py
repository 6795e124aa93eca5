"""The files of a model's folder except for its weights: configuration, tokenizer, processor, chat template."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from megatron_vppo.weights.dist_metadata import DIST_CKPT

WEIGHT_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.ckpt",
    "*.pkl", "*.pickle", "*.joblib", DIST_CKPT,
)  # fmt: skip
"""The files that hold weights, in whatever format, as patterns."""


def copy_config_files(source: Path, target: Path) -> None:
    """Copies everything except for weights and hidden files, and makes the target if it does not exist.

    The first failure ends it. shutil.copytree would continue, and turn a full disk into a list of texts.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = os.listdir(source)
    for name in sorted({*names} - shutil.ignore_patterns(*WEIGHT_FILES, ".*")(str(source), names)):
        if (source / name).is_dir():
            copy_config_files(source / name, target / name)
        else:
            shutil.copy2(source / name, target / name)


def name_dtype(folder: Path, dtypes: Collection[torch.dtype]) -> None:
    """Writes the dtype of the weights into config.json if all have the same one and it says another."""
    if len(set(dtypes)) != 1:
        return
    name = str(next(iter(dtypes))).removeprefix("torch.")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    wrong = [
        (section, key) for section in sections for key in ("dtype", "torch_dtype") if section.get(key, name) != name
    ]
    for section, key in wrong:
        section[key] = name
    if wrong:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
