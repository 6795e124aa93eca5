"""Two updates in a row equal one, a checkpoint, and the second, bit by bit, under the less plain layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core import parallel_state

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.checkpoint import load_checkpoint
from megatron_vppo.parallel.layout import Layout
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config, tiny_qwen3_config
from tests.parallel.case import Case
from tests.parallel.policy_rig import RESUMED_OPTIM, make_policy, resumed_equals_straight

RANKS = 4
INTERLEAVED = ModelOptions(virtual_stages=2, sequence_parallel=True)
IMAGES = ModelOptions(vision_split="images", sequence_parallel=True)
FROZEN = ModelOptions(frozen=frozenset({"vision_tower", "projector"}))
TOWER_ONLY = ModelOptions(frozen=frozenset({"language_model"}))
CASES = {
    "interleaved": Case(tensor=2, pipeline=2, options=INTERLEAVED),
    "whole towers": Case(tensor=2, context=2, options=IMAGES),
    "frozen": Case(context=2, options=FROZEN),
    "a stage with nothing to train": Case(pipeline=2, options=TOWER_ONLY),
}
MODELS = {
    "Qwen2.5-VL": tiny_config(tied=True, vocab=299, num_hidden_layers=4),
    "Qwen3-VL": tiny_qwen3_config(tied=False, vocab=301, taps=(1,), num_hidden_layers=4),
}


def _rank(rank: int, world: int, folders: dict[str, Path], checkpoints: Path) -> dict[tuple[str, str], bool]:
    exact = {}
    for name, case in CASES.items():
        layout = case.open()
        for model, folder in folders.items():
            place = checkpoints / f"{name} {model}"
            exact[name, model] = resumed_equals_straight(
                folder, layout, place, distributed_optimizer=True, options=case.options
            )
            if name == "frozen":
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
