"""Complete training state in Megatron's distributed checkpoint format: weights, optimizer, random generators, position.

A checkpoint is written under a temporary name and renamed when every rank is done, so a folder named `global_step_N` is
always whole. Old checkpoints are deleted after the rename, never before.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vppo.parallel.checkpoint_failure import naming_failed_writes
from megatron_vppo.parallel.checkpoint_fit import check_fits, check_loaded_optimizer, check_loaded_weights
from megatron_vppo.parallel.checkpoint_folder import (
    STATE,
    SavedSizes,
    check_whole,
    checkpoint_steps,
    read_state,
    step_folder,
)
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.offload import optimizer_tensors, weight_tensors
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.system.agreement import on_every_rank
from megatron_vppo.system.processes import die_with_parent
from megatron_vppo.system.whole import remove_folder, unfinished_folder, whole_file, whole_folder
from megatron_vppo.weights.dist_metadata import DIST_CKPT, naming
from megatron_vppo.weights.load import load_sharded
from megatron_vppo.weights.residence import require_resident

LATEST = "latest_checkpointed_iteration.txt"
_METADATA = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
"""With it, weights load under any layout, and optimizer state under the same tensor and pipeline sizes and any
data-parallel size. Megatron's other format, 'fully_reshardable', corrupts the state if there is padding between
parameters (its own warning says so; seen in 0.16.1 with two pipeline stages)."""


def save_checkpoint(
    folder: Path, *, step: int, trainable: Trainable, layout: Layout, state: Mapping[str, Any], keep: int
) -> None:
    """Writes `global_step_{step}`; a collective over all ranks.

    Args:
        state: JSON values with which the loop continues; those of rank 0 are written.
        keep: the number of newest checkpoints that stay.

    Raises:
        RuntimeError: weights or optimizer state are offloaded (offload.py).
        ValueError: the folder cannot be made, another run is writing it, or the disk is full.
    """
    require_resident((*weight_tensors(trainable), *optimizer_tensors(trainable)), what="checkpoint")
    with _filled_by_all_ranks(step_folder(folder, step), layout) as unfinished:
        _use_result_queue_of_ours()
        _allocate_adam_state(trainable)  # no step may have had anything to train on yet
        with naming_failed_writes(step_folder(folder, step)):
            dist_checkpointing.save(_sharded_state(trainable, layout, is_loading=False), str(unfinished / DIST_CKPT))
        if layout.rank == 0:
            sizes = _sizes(trainable, layout).model_dump()
            (unfinished / STATE).write_text(json.dumps({"step": step, **sizes, **state}, indent=1))
    if layout.rank == 0:
        with whole_file(folder / LATEST) as file:
            file.write(str(step).encode())
        older = [other for other in checkpoint_steps(folder) if other < step]
        for old in older[: max(0, len(older) - (keep - 1))]:  # this one is kept too
            remove_folder(step_folder(folder, old))
        for leftover in folder.glob(".global_step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
    dist.barrier()


@contextmanager
def _filled_by_all_ranks(target: Path, layout: Layout) -> Iterator[Path]:
    """Gives every rank the same folder to write into; it becomes `target` when all of them are done."""
    with ExitStack() as on_rank_zero:
        if layout.rank == 0:
            unfinished = on_rank_zero.enter_context(whole_folder(target, replace=True))
            (unfinished / DIST_CKPT).mkdir()
        dist.barrier()  # the folder is there
        yield unfinished_folder(target)
        dist.barrier()  # every rank has written its files, and rank 0 may rename the folder


def load_checkpoint(folder: Path, *, step: int, trainable: Trainable, layout: Layout) -> dict[str, Any]:
    """Restores everything from `global_step_{step}` and returns the loop's state; a collective over all ranks.

    Raises:
        ValueError: see `check_checkpoint`; until then nothing is loaded.
        DamagedCheckpoint: a weight or the optimizer's state that was loaded holds NaN or infinity.
    """
    state = check_checkpoint(folder, step=step, trainable=trainable, layout=layout)
    dist_ckpt = step_folder(folder, step) / DIST_CKPT
    loaded = load_sharded(_sharded_state(trainable, layout, is_loading=True), dist_ckpt)
    for stage, key in zip(trainable.stages, _model_keys(trainable), strict=True):
        stage.load_state_dict(loaded[key])
    on_every_rank(partial(check_loaded_weights, trainable, dist_ckpt))
    if trainable.trains_here:
        _load_optimizer(trainable, loaded["optimizer"])
    on_every_rank(partial(check_loaded_optimizer, trainable, dist_ckpt))
    _set_rng_state(loaded["rng"])
    return {name: value for name, value in state.items() if name not in SavedSizes.model_fields}


def check_checkpoint(folder: Path, *, step: int, trainable: Trainable, layout: Layout) -> dict[str, Any]:
    """Checks that `global_step_{step}` can be loaded, and loads nothing of it; a collective over all ranks.

    Returns:
        Its STATE.

    Raises:
        DamagedCheckpoint: something is missing or damaged; names the file.
        ValueError: the checkpoint was written with other sizes, stages, frozen parts, vision split or backend, or of
            another model; or this rank does not see it. All ranks raise the same.
    """
    state = on_every_rank(partial(_check_state, folder, step, trainable, layout))
    _allocate_adam_state(trainable)
    sharded = _sharded_state(trainable, layout, is_loading=True)
    on_every_rank(partial(check_fits, step_folder(folder, step) / DIST_CKPT, sharded))
    return state


def _check_state(folder: Path, step: int, trainable: Trainable, layout: Layout) -> dict[str, Any]:
    source = step_folder(folder, step)
    with naming(source):
        if layout.rank > 0 and not source.is_dir():
            raise ValueError(
                f"{source} is there for rank 0, but not for rank {layout.rank} on {socket.gethostname()}; set "
                "trainer.runs_dir to a folder that all machines share"
            )
    state = check_whole(folder, step) if layout.rank == 0 else read_state(folder, step)
    present = _sizes(trainable, layout).model_dump()
    written = {name: state[name] for name in present}
    if written != present:
        raise ValueError(
            f"{source} was written with {written}, this run has {present}; set the same to continue, or another "
            "trainer.experiment_name to start from the beginning"
        )
    return state


def _use_result_queue_of_ours() -> None:
    """Gives Megatron's checkpoint writers (0.16 to 0.19) a queue for their reports.

    The server of the queue is a process of its own. Megatron's outlives a rank that is killed; this one ends with it.
    """
    if getattr(filesystem_async, "_results_queue", None) is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(die_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _sizes(trainable: Trainable, layout: Layout) -> SavedSizes:
    model = trainable.stages[0]
    return SavedSizes(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_layers=list(model.stage_layers),
        vision_split=layout.vision_split,
        freeze=sorted(trainable.frozen),
        backend=model.parts.name,
    )


def _model_keys(trainable: Trainable) -> list[str]:
    """Returns Megatron's keys of the stages: numbered if a rank holds several.

    A written checkpoint does not contain them.
    """
    count = len(trainable.stages)
    return ["model"] if count == 1 else [f"model{number}" for number in range(count)]


def _sharded_state(trainable: Trainable, layout: Layout, *, is_loading: bool) -> dict[str, Any]:
    models = {
        key: stage.sharded_state_dict(metadata=dict(_METADATA))
        for key, stage in zip(_model_keys(trainable), trainable.stages, strict=True)
    }
    # One generator state serves all ranks: the trainer draws alike on every rank, or on rank 0 alone.
    state = {**models, "rng": ShardedObject("rng", _rng_state(), (1,), (0,), replica_id=layout.rank)}
    if trainable.trains_here:
        state["optimizer"] = trainable.optimizer.sharded_state_dict(
            models if len(models) > 1 else models["model"], is_loading=is_loading, metadata=dict(_METADATA)
        )
    return state


def _allocate_adam_state(trainable: Trainable) -> None:
    """Allocates what the first update would, so that a checkpoint can be written and read; existing state stays.

    Megatron (0.16 to 0.19) does so itself for the fused optimizers of Apex and TransformerEngine. For torch's it misses
    the step count, without which its `state_dict` fails.
    """
    adam = _torch_adam(trainable)
    if adam is None:
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            if adam.state[parameter]:
                continue
            adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


@torch.no_grad()
def _load_optimizer(trainable: Trainable, state: dict[str, Any]) -> None:
    """Loads the optimizer as Megatron does, except for the step counts of torch's Adam.

    Megatron's distributed optimizer (0.16 to 0.19) looks for them among the sharded tensors, where they are not. It
    then gives all parameters one and the same tensor, which the next step would raise once per parameter.
    """
    adam = _torch_adam(trainable)
    sharded = state.pop("param_state", None) if adam else None
    trainable.optimizer.load_state_dict(state)
    if adam is None:
        return
    steps = {parameter: values.pop("step") for parameter, values in adam.state.items()}
    if sharded is not None:
        _only_optimizer(trainable).load_parameter_state_from_dp_reshardable(sharded)
    for parameter, step in steps.items():
        adam.state[parameter]["step"] = step.clone()


def _torch_adam(trainable: Trainable) -> torch.optim.Optimizer | None:
    adam = _only_optimizer(trainable).optimizer
    return adam if isinstance(adam, torch.optim.Adam | torch.optim.AdamW) else None


def _only_optimizer(trainable: Trainable) -> Any:
    """Returns the only optimizer: Megatron chains one optimizer per kind of parameter; a dense model has one."""
    (optimizer,) = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    return optimizer


def _rng_state() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
