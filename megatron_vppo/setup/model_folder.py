"""Where a model's files are."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download


def model_folder(path: str) -> Path:
    """A local Hugging Face folder as it is; anything else is a hub id, downloaded once into the hub's cache.

    Raises:
        ValueError: a path that does not exist.
    """
    local = Path(path)
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ValueError(f"model.path={path}: no such folder, and not a hub id of the form owner/name")
    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
