"""Engines as the tests start them: small, on CPU, without compilation."""

from __future__ import annotations

from typing import Any

from megatron_vppo.rollout.records import EngineSettings


def engine_settings(model: str = "m", **changes: Any) -> EngineSettings:
    small = {
        "max_model_len": 64,
        "dtype": "float32",
        "max_num_seqs": 16,
        "cpu_kv_cache_gib": 0.125,
        "gpu_memory_utilization": 0.2,
        "enforce_eager": True,
    }
    return EngineSettings(model=model, **{**small, **changes})
