"""Two updates in a row equal one, a checkpoint, and the second, bit by bit, under the less plain layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core import parallel_state

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.checkpoint import load_checkpoint
from megatron_vppo.parallel.layout import Layout, init_layout
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.policy_rig import RESUMED_OPTIM, make_policy, resumed_equals_straight

RANKS = 4
INTERLEAVED = ModelOptions(virtual_stages=2, sequence_parallel=True)
IMAGES = ModelOptions(vision_split="images", sequence_parallel=True)
FROZEN = ModelOptions(frozen=frozenset({"vision_tower", "projector"}))
TOWER_ONLY = ModelOptions(frozen=frozenset({"language_model"}))
CASES = {
    "interleaved": ({"tensor": 2, "pipeline": 2, "virtual_stages": 2}, INTERLEAVED),
    "whole towers": ({"tensor": 2, "pipeline": 1, "context": 2, "vision_split": "images"}, IMAGES),
    "frozen": ({"tensor": 1, "pipeline": 1, "context": 2}, FROZEN),
    "a stage with nothing to train": ({"tensor": 1, "pipeline": 2}, TOWER_ONLY),
}
"""Arguments of init_layout, and options."""
MODELS = {
    "Qwen2.5-VL": tiny_config(tied=True, vocab=299, num_hidden_layers=4),
    "Qwen3-VL": tiny_qwen3_config(tied=False, vocab=301, taps=(1,), num_hidden_layers=4),
}


def _rank(rank: int, world: int, folders: dict[str, Path], checkpoints: Path) -> dict[tuple[str, str], bool]:
    exact = {}
    for case, (sizes, options) in CASES.items():
        layout = init_layout(**sizes, timeout_seconds=300)  # type: ignore[arg-type]
        for model, folder in folders.items():
            place = checkpoints / f"{case} {model}"
            exact[case, model] = resumed_equals_straight(
                folder, layout, place, distributed_optimizer=True, options=options
            )
            if case == "frozen":
                _other_parts_are_refused(folder, layout, place)
        parallel_state.destroy_model_parallel()
    return exact


def _other_parts_are_refused(folder: Path, layout: Layout, checkpoints: Path) -> None:
    """The optimizer has no state for what was frozen."""
    policy = make_policy(folder, layout, rows=2, optim=RESUMED_OPTIM, options=ModelOptions())
    with pytest.raises(ValueError, match=r"'freeze': \['projector', 'vision_tower'\].*set the same to continue"):
        load_checkpoint(checkpoints, step=2, trainable=policy.trainable, layout=layout)


@pytest.mark.distributed
def test_resume_is_exact(tmp_path: Path) -> None:
    folders = {}
    for name, config in MODELS.items():
        folders[name] = tmp_path / name
        save_tiny_model(folders[name], config)
    for exact in run_gloo(_rank, RANKS, folders, tmp_path / "checkpoints", timeout_seconds=600):
        assert exact == dict.fromkeys(((case, model) for case in CASES for model in MODELS), True)
