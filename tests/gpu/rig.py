"""Models that a GPU's kernels take: language heads of 64, widths of 128 and more."""

from __future__ import annotations

from typing import Any

from tests.models.tiny import tiny_config, tiny_qwen3_config

TEXT = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"intermediate_size": 256, "num_heads": 2, "out_hidden_size": 256}
VISION_WIDTHS = {"Qwen2.5-VL": 160, "Qwen3-VL": 144}
"""Heads of 80 and of 72, as in the released towers."""


def gpu_configs() -> dict[str, Any]:
    """Four layers each, by family."""
    rope25 = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
    rope3 = {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_theta": 1e4}
    layers = {"num_hidden_layers": 4}
    configs = {
        "Qwen2.5-VL": tiny_config(tied=False, vocab=304, **TEXT, **layers, rope_parameters=rope25),
        "Qwen3-VL": tiny_qwen3_config(
            tied=True, vocab=304, taps=(1,), **TEXT, **layers, head_dim=64, rope_parameters=rope3
        ),
    }
    for family, config in configs.items():
        for name, size in {**VISION, "hidden_size": VISION_WIDTHS[family]}.items():
            setattr(config.vision_config, name, size)
    return configs
