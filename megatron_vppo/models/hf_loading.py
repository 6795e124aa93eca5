"""Hugging Face safetensors -> the parameters of one rank's model."""

from __future__ import annotations

from pathlib import Path

from megatron_vppo.models.qwen25_vl.model import Qwen25VLModel


def load_hf_weights(model: Qwen25VLModel, folder: str | Path) -> None:
    """Fills every parameter of this rank's pipeline stage, reading only this rank's part of each tensor.

    Raises:
        ValueError: a tensor is missing, has another shape than the configuration says, or is not part of the model.
    """
