"""Reads a model's `config.json`, with errors that name the file. Nothing in a model's folder is ever executed."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

from megatron_vppo.models.config_checks import complete_config, config_problems
from megatron_vppo.models.families import FAMILIES, family_of
from megatron_vppo.models.hf_config import HfConfig


def read_hf_config(folder: Path) -> HfConfig:
    """Returns the configuration of a supported model, with what it leaves out filled in (`complete_config`).

    Raises:
        ValueError: there is no such folder or file, it cannot be read, the model is of another kind, or its numbers do
            not fit one another.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a model in Hugging Face's format")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    kind = described.get("model_type") if isinstance(described, dict) else None
    if kind not in FAMILIES:  # before transformers, which would offer to run code for a type that it does not know
        raise ValueError(f"{path}: a model of type {kind!r} is not supported; {', '.join(sorted(FAMILIES))} are")
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        family = family_of(hf_config)
        complete_config(hf_config, family)
        problems = config_problems(hf_config, family)
    except Exception as error:  # transformers checks little, and raises whatever it runs into
        raise ValueError(f"{path}: {error or type(error).__name__}") from error
    if problems:
        raise ValueError("\n  - ".join([f"{path} describes a model that cannot be built:", *problems]))
    return hf_config
