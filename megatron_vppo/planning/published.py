"""The released models that this project is for: their configurations and their sizes, without weights.

docs/plan.md says where each number comes from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.model_files import check_what_is_there

CONFIGS = Path(__file__).with_name("published_configs")
"""The folder with one JSON file per model: those fields of its config.json that decide names, shapes and rotary angles.
"""


@dataclass(frozen=True)
class PublishedModel:
    name: str
    hub_id: str
    """The repository on the Hugging Face hub."""
    parameters: int
    """The values that its safetensors files store. They store a tied output layer once."""


PUBLISHED = {
    model.name: model
    for model in (
        PublishedModel("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        PublishedModel("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        PublishedModel("qwen2.5-vl-32b", "Qwen/Qwen2.5-VL-32B-Instruct", 33_452_718_336),
        PublishedModel("qwen2.5-vl-72b", "Qwen/Qwen2.5-VL-72B-Instruct", 73_410_777_344),
        PublishedModel("qwen3-vl-2b", "Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032),
        PublishedModel("qwen3-vl-4b", "Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        PublishedModel("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
        PublishedModel("qwen3-vl-32b", "Qwen/Qwen3-VL-32B-Instruct", 33_357_390_064),
    )
}


def configuration_of(model: str) -> HfConfig:
    """Reads the configuration of a released model, by its name, or of a Hugging Face folder. Downloads nothing.

    Raises:
        ValueError: neither of the two, or a folder whose files contradict one another.
    """
    if model in PUBLISHED:
        return published_config(model)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"--model {model}: no folder with a config.json, and not one of {', '.join(PUBLISHED)}")
    return check_what_is_there(Path(model))


def published_config(name: str) -> HfConfig:
    """Returns the configuration of a released model, as an object of transformers' class for its family.

    Raises:
        ValueError: a name that is not in PUBLISHED.
    """
    if name not in PUBLISHED:
        raise ValueError(f"there is no released model {name!r}; known are {', '.join(PUBLISHED)}")
    return AutoConfig.for_model(**json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))
