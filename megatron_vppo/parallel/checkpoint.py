"""Complete training state in Megatron's distributed checkpoint format: weights, optimizer, random generators, position.

A checkpoint is written under a temporary name and renamed when every rank is done, so a folder named `global_step_N` is
always whole. Old checkpoints are deleted after the rename, never before.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import Metadata

from megatron_vppo.parallel.checkpoint_buffers import buffers_to_read, set_buffers
from megatron_vppo.parallel.checkpoint_failure import naming_failed_writes
from megatron_vppo.parallel.checkpoint_fit import (
    check_fits,
    check_loaded_optimizer,
    check_loaded_weights,
    check_written_for,
    written_vocabulary,
)
from megatron_vppo.parallel.checkpoint_folder import (
    STATE,
    SavedSizes,
    SavedState,
    check_whole,
    read_state,
    step_folder,
)
from megatron_vppo.parallel.checkpoint_keep import keep_checkpoints
from megatron_vppo.parallel.checkpoint_writers import noticing_lost_writers, use_result_queue_of_ours
from megatron_vppo.parallel.layout import Layout
from megatron_vppo.parallel.offload import optimizer_tensors, weight_tensors
from megatron_vppo.parallel.optimizer_shards import optimizer_shards, share_weights
from megatron_vppo.parallel.optimizer_state import allocate_state, set_updates, updates_of
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.system.agreement import on_every_rank
from megatron_vppo.system.records import parse_record
from megatron_vppo.system.whole import unfinished_folder, whole_file, whole_folder
from megatron_vppo.weights.dist_metadata import DIST_CKPT, naming, read_metadata
from megatron_vppo.weights.load import load_sharded
from megatron_vppo.weights.residence import require_resident

LATEST = "latest_checkpointed_iteration.txt"


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    trainable: Trainable,
    layout: Layout,
    state: Mapping[str, Any],
    keep: int,
    accuracy: float | None = None,
    model_only: bool = False,
) -> None:
    """Writes `global_step_{step}`; a collective over all ranks.

    Args:
        state: JSON values with which the loop continues; those of rank 0 are written.
        keep: the number of newest checkpoints that stay, besides the best one; -1: all stay.
        accuracy: what the validation of this step found; None: it was not validated.
        model_only: leave out the optimizer's state.

    Raises:
        RuntimeError: weights or optimizer state are offloaded (offload.py).
        ValueError: the folder cannot be made, another run is writing it, or the disk is full.
    """
    with filled_by_all_ranks(step_folder(folder, step), layout) as unfinished:
        use_result_queue_of_ours()
        with naming_failed_writes(step_folder(folder, step)), noticing_lost_writers(step_folder(folder, step)):
            written = state_to_write(trainable, layout, model_only=model_only)
            dist_checkpointing.save(written, str(unfinished / DIST_CKPT))
        write_state(unfinished, step=step, trainable=trainable, layout=layout, state=state, model_only=model_only)
    conclude_checkpoint(folder, step=step, layout=layout, accuracy=accuracy, keep=keep)


def write_state(
    unfinished: Path, *, step: int, trainable: Trainable, layout: Layout, state: Mapping[str, Any], model_only: bool
) -> None:
    """Writes STATE, on rank 0; a collective over all ranks. The arguments are those of `save_checkpoint`."""
    about = {
        **_sizes(trainable, layout).model_dump(),
        "optimizer": "none" if model_only else "by parameter",
        "optimizer_updates": updates_of(trainable),
    }
    if layout.rank == 0:
        (unfinished / STATE).write_text(json.dumps({"step": step, **about, **state}, indent=1))


def conclude_checkpoint(folder: Path, *, step: int, layout: Layout, accuracy: float | None, keep: int) -> None:
    """Notes the checkpoint of `step`, which is in its place, and removes those that need not stay; a collective over
    all ranks. The arguments are those of `save_checkpoint`.
    """
    if layout.rank == 0:
        with whole_file(folder / LATEST) as file:
            file.write(str(step).encode())
        keep_checkpoints(folder, step=step, accuracy=accuracy, keep=keep)
        for leftover in folder.glob(".global_step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
    dist.barrier()


@contextmanager
def filled_by_all_ranks(target: Path, layout: Layout) -> Iterator[Path]:
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

    Any layout may have written it. If it holds no optimizer state, the optimizer starts from zero.

    Raises:
        ValueError: see `check_checkpoint`; until then nothing is loaded.
        DamagedCheckpoint: a weight or the optimizer's state that was loaded holds NaN or infinity.
    """
    state, sharded = _checked(folder, step, trainable, layout)
    saved = parse_record(SavedState, state)
    dist_ckpt = step_folder(folder, step) / DIST_CKPT
    # Megatron's own check, that all ranks together read everything exactly once, knows no pieces of unequal size. That
    # nothing is missing was seen key by key.
    loaded = load_sharded(sharded, dist_ckpt, validate_access_integrity=False)
    for stage, key in zip(trainable.stages, _model_keys(trainable), strict=True):
        missing, _ = stage.load_state_dict(loaded[key], strict=False)
        assert all(name.endswith("_extra_state") for name in missing), missing  # that of other layers; ours is empty
    on_every_rank(partial(check_loaded_weights, trainable, dist_ckpt))
    if trainable.trains_here:
        _set_optimizer(trainable, saved, sharded, loaded)
    on_every_rank(partial(check_loaded_optimizer, trainable, dist_ckpt))
    _set_rng_state(loaded["rng"])
    about = SavedState.model_fields.keys() - {"step"}
    return {name: value for name, value in state.items() if name not in about}


def check_checkpoint(folder: Path, *, step: int, trainable: Trainable, layout: Layout) -> dict[str, Any]:
    """Checks that `global_step_{step}` can be loaded, and loads nothing of it; a collective over all ranks.

    Returns:
        Its STATE.

    Raises:
        DamagedCheckpoint: something is missing or damaged; names the file.
        ValueError: the checkpoint has no optimizer state for a part that this run trains, is one of another model or
            dtype, or is one of an older version and of other sizes; or this rank does not see it. All ranks raise the
            same.
    """
    state, _ = _checked(folder, step, trainable, layout)
    return state


def _checked(folder: Path, step: int, trainable: Trainable, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the checkpoint's STATE and what this rank has to load of it, after all checks."""
    state = on_every_rank(partial(_check_state, folder, step, trainable, layout))
    saved = parse_record(SavedState, state)
    dist_ckpt = step_folder(folder, step) / DIST_CKPT
    metadata = on_every_rank(partial(read_metadata, dist_ckpt))
    allocate_state(trainable)
    sharded = _state_to_read(trainable, layout, saved, metadata)
    vocabulary = written_vocabulary(trainable, saved)
    on_every_rank(partial(check_fits, dist_ckpt, metadata, sharded, vocabulary=vocabulary))
    return state, sharded


def _check_state(folder: Path, step: int, trainable: Trainable, layout: Layout) -> dict[str, Any]:
    source = step_folder(folder, step)
    with naming(source):
        if layout.rank > 0 and not source.is_dir():
            raise ValueError(
                f"{source} is there for rank 0, but not for rank {layout.rank} on {socket.gethostname()}; set "
                "trainer.runs_dir to a folder that all machines share"
            )
    state = check_whole(folder, step) if layout.rank == 0 else read_state(folder, step)
    check_written_for(source, parse_record(SavedState, state), _sizes(trainable, layout))
    return state


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


def _model_states(trainable: Trainable) -> dict[str, dict[str, Any]]:
    return {
        key: stage.sharded_state_dict() for key, stage in zip(_model_keys(trainable), trainable.stages, strict=True)
    }


def _rng(layout: Layout) -> ShardedObject:
    """Wraps the random generators. One state serves all ranks: they draw alike, or rank 0 alone does."""
    return ShardedObject("rng", _rng_state(), (1,), (0,), replica_id=layout.rank)


def state_to_write(trainable: Trainable, layout: Layout, *, model_only: bool) -> dict[str, Any]:
    """Returns what this rank has to write of a checkpoint, as Megatron takes it.

    Raises:
        RuntimeError: weights or optimizer state are offloaded (offload.py).
    """
    require_resident((*weight_tensors(trainable), *optimizer_tensors(trainable)), what="checkpoint")
    allocate_state(trainable)  # no step may have had anything to train on yet
    models = _model_states(trainable)
    states = list(models.values())
    optimizer = {} if model_only else optimizer_shards(trainable, states, layout)
    share_weights(states, layout)
    return {**models, "rng": _rng(layout), "optimizer": optimizer}


def _state_to_read(trainable: Trainable, layout: Layout, saved: SavedState, metadata: Metadata) -> dict[str, Any]:
    models = _model_states(trainable)
    optimizer: dict[str, Any] = {}
    if saved.optimizer == "by parameter":
        optimizer = dict(optimizer_shards(trainable, list(models.values()), layout))
    elif saved.optimizer is None and trainable.trains_here:
        optimizer = buffers_to_read(trainable, models)
    # Layers of another backend have other extra states. What is not in the checkpoint starts from zero.
    held = {
        key: {
            name: item
            for name, item in state.items()
            if not isinstance(item, ShardedObject) or item.unique_key in metadata.state_dict_metadata
        }
        for key, state in models.items()
    }
    return {**held, "rng": _rng(layout), "optimizer": optimizer}


@torch.no_grad()
def _set_optimizer(
    trainable: Trainable, saved: SavedState, sharded: Mapping[str, Any], loaded: Mapping[str, Any]
) -> None:
    if saved.optimizer is None:
        set_buffers(trainable, loaded["optimizer"])
    elif saved.optimizer == "none":
        trainable.optimizer.reload_model_params()
    else:
        for number, shard in sharded["optimizer"].items():
            shard.data.copy_(loaded["optimizer"][number])  # where Megatron filled it itself, this changes nothing
        set_updates(trainable, saved.optimizer_updates)


def _rng_state() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
