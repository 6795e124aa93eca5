"""The folder with a model's files."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download


def model_folder(path: str, *, option: str = "model.path") -> Path:
    """Returns a local Hugging Face folder as it is. Anything else is a hub id, downloaded once into the hub's cache.

    Args:
        option: the setting or option of the command line that names it, for messages.

    Raises:
        ValueError: the path is no folder, and no hub id either, or the hub does not give it.
    """
    local = Path(path)
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ValueError(f"{option}={path}: no such folder, and not a hub id of the form owner/name")
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except (OSError, ValueError) as error:  # no network, no such repository, no name of one
        raise ValueError(f"{option}={path}: no such folder, and not read from the hub ({error})") from error
