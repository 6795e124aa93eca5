"""A checkpoint that is broken off leaves nothing under its name, and the next one cleans up."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import Metadata

from megatron_vppo.parallel import checkpoint
from megatron_vppo.parallel.checkpoint import LATEST, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.checkpoint_folder import checkpoint_steps
from megatron_vppo.parallel.layout import Layout, init_layout, single_rank
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.damage import description_with
from tests.parallel.policy_rig import make_policy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, tiny_config(tied=False, vocab=61))
    return folder


def make_ranks(model: Path) -> tuple[Layout, MegatronPolicy]:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=60)
    return layout, make_policy(model, layout, rows=2)


def save(folder: Path, layout: Layout, policy: MegatronPolicy, *, step: int, state: str) -> None:
    save_checkpoint(folder, step=step, trainable=policy.trainable, layout=layout, state={"state": state}, keep=1)


def _second_one_is_broken_off(rank: int, world: int, model: Path, folder: Path, step: int, how: str) -> None:
    layout, policy = make_ranks(model)
    save(folder, layout, policy, step=1, state="old")

    def broken_off(state: dict[str, Any], dist_ckpt: str) -> None:
        (Path(dist_ckpt) / f"half_{rank}.distcp").write_text("half")
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            raise OSError("broken disk")

    checkpoint.dist_checkpointing.save = broken_off
    save(folder, layout, policy, step=step, state="new")


def _saved_again(rank: int, world: int, model: Path, folder: Path) -> dict[str, Any]:
    layout, policy = make_ranks(model)
    load_checkpoint(folder, step=1, trainable=policy.trainable, layout=layout)
    save(folder, layout, policy, step=2, state="new")
    return load_checkpoint(folder, step=2, trainable=policy.trainable, layout=layout)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("step", "how"),
    [
        (1, "killed"),
        pytest.param(2, "killed", marks=pytest.mark.extended),
        pytest.param(1, "failed", marks=pytest.mark.extended),
    ],
)
def test_a_rank_that_ends_in_the_middle(step: int, how: str, model: Path, tmp_path: Path) -> None:
    """`step` 1 would replace a whole checkpoint of that name."""
    with pytest.raises(RuntimeError, match=r"broken disk|exit codes by rank: .*1: -9|failed first"):
        run_gloo(_second_one_is_broken_off, 2, model, tmp_path, step, how)
    assert checkpoint_steps(tmp_path) == [1]
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_1"]
    assert not [name for name in files_of(tmp_path / "global_step_1") if "half" in name]
    assert b'"old"' in (tmp_path / "global_step_1" / checkpoint.STATE).read_bytes()

    states = run_gloo(_saved_again, 2, model, tmp_path)
    assert [state["state"] for state in states] == ["new", "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_2", LATEST]
    assert (tmp_path / LATEST).read_text() == "2"


# --- Layers of another backend ----------------------------------------------------------------------------------------


def test_extra_states_that_other_layers_did_not_write(model: Path, tmp_path: Path) -> None:
    """Those of TransformerEngine's layers are more than ours. Weights and moments have the same keys."""

    def forget(metadata: Metadata) -> None:
        extra = {key for key in metadata.state_dict_metadata if "_extra_state/" in key}
        assert len(extra) > 3
        for key in extra:
            del metadata.state_dict_metadata[key]
        places = metadata.storage_data
        for index in [index for index in places if index.fqn in extra]:
            del places[index]

    with single_rank() as layout:
        saved, loaded = (make_policy(model, layout, rows=2) for _ in range(2))
        with torch.no_grad():
            for parameter in saved.trainable.stages[0].parameters():
                parameter.mul_(2)
        save(tmp_path, layout, saved, step=1, state="saved")
        description_with(forget)(tmp_path / "global_step_1")
        load_checkpoint(tmp_path, step=1, trainable=loaded.trainable, layout=layout)
        for (name, weight), (_, other) in zip(saved.hf_weights(), loaded.hf_weights(), strict=True):
            assert torch.equal(weight, other), name
