"""The import of an empty file of theirs, with the keys that cannot be left out and others over them."""

from __future__ import annotations

from pathlib import Path

from megatron_vppo.importing.import_config import ImportedConfig, import_config
from megatron_vppo.importing.sources import read_source

LEAST = {
    "data.train_files": "rows.parquet", "worker.actor.model.model_path": "some/model", "algorithm.disable_kl": "true",
    "worker.rollout.n": "2",
    "worker.reward.reward_function": "examples/reward_function/math.py:compute_score_wo_format",
}  # fmt: skip
"""The keys whose defaults cannot be had here."""
VPPO = {
    "algorithm.use_vppo_on_perception": "true", "algorithm.use_advantage_shaping": "true",
    "algorithm.use_entropy_penalty": "true", "algorithm.online_filtering": "true",
}  # fmt: skip


def import_keys(keys: dict[str, str], folder: Path) -> ImportedConfig:
    """Imports LEAST and `keys`. Relative paths start in `folder`, or in the present one."""
    (folder / "theirs.yaml").write_text("")
    overrides = [f"{key}={value}" for key, value in (LEAST | keys).items()]
    return import_config(read_source(folder / "theirs.yaml", overrides, environment={}), name="theirs.yaml")
