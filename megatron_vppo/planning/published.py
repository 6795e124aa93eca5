"""The released models that this project is for: their configurations without weights, and their sizes.

docs/plan.md says where each number comes from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from megatron_vppo.models.hf_config import HfConfig

CONFIGS = Path(__file__).with_name("published_configs")
"""One JSON file per model: what decides names, shapes and rotary angles, and nothing else of its config.json."""


@dataclass(frozen=True)
class PublishedModel:
    name: str
    hub_id: str
    parameters: int
    """Values that its safetensors files store; a tied output layer is stored once."""


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


def published_config(name: str) -> HfConfig:
    """The configuration of a released model, as transformers' class of its family.

    Raises:
        ValueError: a name that is not in PUBLISHED.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no released model is called {name!r} here; there are {', '.join(PUBLISHED)}")
    return AutoConfig.for_model(**json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))
