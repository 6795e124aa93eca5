"""Checkpoints as older versions wrote them: loaded bit for bit under their own sizes, and refused under others.

They are written here by Megatron's own functions, with the state file that such a checkpoint has.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_vppo.models.options import ModelOptions
from megatron_vppo.parallel.checkpoint import _rng_state, load_checkpoint, save_checkpoint
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.parallel.policy import MegatronPolicy
from tests.gloo import run_gloo
from tests.models.tiny import save_tiny_model, tiny_config
from tests.parallel.optimizer_rig import update_counts, whole_state
from tests.parallel.policy_rig import RESUMED_OPTIM, make_batch, make_policy, make_responses

UNTIED = tiny_config(tied=False, vocab=299)
UNTIED.vision_config.intermediate_size = 64  # older versions did not pad


def save_as_before(folder: Path, policy: MegatronPolicy, *, step: int) -> None:
    layout, trainable = policy.layout, policy.trainable
    metadata = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
    (stage,) = trainable.stages
    model = stage.sharded_state_dict(metadata=dict(metadata))
    rng = ShardedObject("rng", _rng_state(), (1,), (0,), replica_id=layout.rank)
    optimizer = trainable.optimizer.sharded_state_dict(model, is_loading=False, metadata=dict(metadata))
    target = folder / f"global_step_{step}"
    (target / "dist_ckpt").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model, "rng": rng, "optimizer": optimizer}, str(target / "dist_ckpt"))
    state: dict[str, Any] = {
        "step": step, "tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline,
        "pipeline_layers": list(stage.stage_layers), "vision_split": layout.vision_split, "freeze": [],
        "backend": "torch", "data": {"offset": 7},
    }  # fmt: skip
    (target / "trainer_state.json").write_text(json.dumps(state))
    dist.barrier()


def _policy(folder: Path, layout: Layout, *, distributed: bool, dtype: torch.dtype, **options: Any) -> MegatronPolicy:
    optim = dataclasses.replace(RESUMED_OPTIM, use_distributed_optimizer=distributed)
    return make_policy(folder, layout, rows=2, optim=optim, dtype=dtype, options=ModelOptions(**options))


def _rank(rank: int, world: int, folder: Path, where: Path, distributed: bool, dtype: torch.dtype) -> dict[str, bool]:
    layout = init_layout(tensor=1, pipeline=1, timeout_seconds=120)
    batch, same = make_batch(make_responses(), "nll"), {}
    straight, resumed, again = (_policy(folder, layout, distributed=distributed, dtype=dtype) for _ in range(3))
    straight.update(batch)
    straight.update(batch)
    save_as_before(where, straight, step=2)
    state = load_checkpoint(where, step=2, trainable=resumed.trainable, layout=layout)
    assert state == {"step": 2, "data": {"offset": 7}} and update_counts(resumed) == {2.0}
    same["loaded"] = _equal(straight, resumed)
    save_checkpoint(where, step=3, trainable=resumed.trainable, layout=layout, state={}, keep=2)
    load_checkpoint(where, step=3, trainable=again.trainable, layout=layout)
    for policy in (straight, resumed, again):
        policy.update(batch)
    same["trained on"] = _equal(straight, resumed)
    same["written again as now"] = _equal(straight, again)
    if distributed:
        frozen = _policy(folder, layout, distributed=True, dtype=dtype, frozen=frozenset({"projector"}))
        with pytest.raises(ValueError, match=r"by an older version with .*'freeze': \[\].*set the same to continue"):
            load_checkpoint(where, step=2, trainable=frozen.trainable, layout=layout)
        ordinary = _policy(folder, layout, distributed=False, dtype=dtype)
        with pytest.raises(ValueError, match=r"lacks optimizer\.\S+; .*older version.*use_distributed_optimizer"):
            load_checkpoint(where, step=2, trainable=ordinary.trainable, layout=layout)
    return same


def _equal(left: MegatronPolicy, right: MegatronPolicy) -> bool:
    a, b = whole_state(left), whole_state(right)
    pairs = zip(left.hf_weights(), right.hf_weights(), strict=True)
    return all([torch.equal(x, y) for (_, x), (_, y) in pairs]) and all(
        torch.equal(tensor, b[quantity][name]) for quantity, tensors in a.items() for name, tensor in tensors.items()
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("distributed", "dtype"),
    [
        (True, torch.bfloat16),
        pytest.param(True, torch.float32, marks=pytest.mark.extended),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.extended),
    ],
)
def test_a_run_goes_on_from_one_and_writes_it_again(distributed: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", UNTIED)
    args = (tmp_path / "model", tmp_path / "saved", distributed, dtype)
    for same in run_gloo(_rank, 2, *args, timeout_seconds=300):
        assert same == {"loaded": True, "trained on": True, "written again as now": True}
