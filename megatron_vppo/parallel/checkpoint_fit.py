"""The checks that a checkpoint has what this rank will read of it, and that what was read are numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

from megatron_vppo.parallel.checkpoint_folder import SavedSizes, SavedState
from megatron_vppo.parallel.offload import optimizer_tensors
from megatron_vppo.parallel.optimizer_shards import PREFIX
from megatron_vppo.parallel.optimizer_state import MAIN
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint
from megatron_vppo.weights.finite import non_finite
from megatron_vppo.weights.kinds import padded_vocabulary
from megatron_vppo.weights.load import check_loaded
from megatron_vppo.weights.padding import sharded_blocks


def check_written_for(source: Path, saved: SavedState, present: SavedSizes) -> None:
    """Checks that a run of these sizes can use the optimizer state of a checkpoint.

    Raises:
        ValueError: it has none for a part that the run trains; or it is of an older version and has other sizes.
    """
    written = {name: getattr(saved, name) for name in SavedSizes.model_fields}
    if saved.optimizer is None and written != present.model_dump():
        raise ValueError(
            f"{source} was written by an older version with {written}, this run has {present.model_dump()}; set the "
            "same to continue (the next checkpoint is free of them), or another trainer.experiment_name to start from "
            "the beginning"
        )
    if saved.optimizer == "by parameter" and (new := sorted(set(saved.freeze) - set(present.freeze))):
        raise ValueError(
            f"{source} has no optimizer state for {', '.join(new)}: it was written with model.freeze={saved.freeze}, "
            f"this run has model.freeze={present.freeze}; set the same to continue, or start from its weights with "
            "model.path (a folder of the run's huggingface/, or one that vppo convert makes) and another "
            "trainer.experiment_name"
        )


def written_vocabulary(trainable: Trainable, saved: SavedState) -> int:
    """Returns the rows of the embedding as they were written: padded to a multiple of that tensor-parallel size."""
    rows = {entry.kind.unpadded_rows for entry in trainable.stages[0].weight_map} - {None}
    (tokens,) = rows
    assert tokens is not None
    return padded_vocabulary(tokens, saved.tensor_model_parallel_size)


def check_fits(dist_ckpt: Path, metadata: Metadata, sharded: dict[str, Any], *, vocabulary: int) -> None:
    """Checks that a checkpoint holds everything of a state, in the same shapes.

    Args:
        metadata: its description.
        sharded: the state of this rank as Megatron's loader takes it.
        vocabulary: see `written_vocabulary`.

    Raises:
        ValueError: it lacks something, has a tensor of another shape, or fp32 weights that this run would not read.
    """
    keys = set()
    for item in nested_values(sharded):
        if isinstance(item, ShardedObject):
            _check_key(dist_ckpt, metadata, item.unique_key)
        elif isinstance(item, ShardedTensor | ShardedTensorFactory):
            for block in sharded_blocks(item):
                keys.add(block.key)
                _check_key(dist_ckpt, metadata, block.key)
                _check_shape(dist_ckpt, metadata, block, vocabulary=vocabulary)
    _check_main_weights(dist_ckpt, metadata, keys)


def check_loaded_weights(trainable: Trainable, dist_ckpt: Path) -> None:
    """Checks the weights that were just loaded. Raises DamagedCheckpoint if one holds NaN or infinity."""
    for stage in trainable.stages:
        check_loaded(stage, dist_ckpt)


def check_loaded_optimizer(trainable: Trainable, dist_ckpt: Path) -> None:
    """Checks the optimizer's state that was just loaded. Raises DamagedCheckpoint if it holds NaN or infinity.

    Its fp32 weights may be the model's own, which it has just written over.
    """
    weights = (parameter for stage in trainable.stages for parameter in stage.parameters())
    for tensor in (*optimizer_tensors(trainable), *weights):
        if tensor.is_floating_point() and (found := non_finite(tensor)):
            raise DamagedCheckpoint(f"the optimizer's state in {dist_ckpt} holds {found}")


def _check_main_weights(dist_ckpt: Path, metadata: Metadata, keys: set[str]) -> None:
    """Refuses fp32 weights of the optimizer that a run would leave out and read the rounded ones instead."""
    main = f"{PREFIX}{MAIN}."
    reads_optimizer, reads_main = (any(key.startswith(start) for key in keys) for start in (PREFIX, main))
    if reads_optimizer and not reads_main and any(key.startswith(main) for key in metadata.state_dict_metadata):
        raise ValueError(
            f"{dist_ckpt} holds rounded weights, and those of the optimizer in float32 beside them, which this run "
            "would not read; set the model.dtype that the run began with"
        )


def _check_key(dist_ckpt: Path, metadata: Metadata, key: str) -> None:
    if key not in metadata.state_dict_metadata:
        raise ValueError(
            f"{dist_ckpt} lacks {key}; set model.path and model.dtype as the run began (and, if an older version wrote "
            "it, parallel.use_distributed_optimizer), or another trainer.experiment_name to start from the beginning"
        )


def _check_shape(dist_ckpt: Path, metadata: Metadata, block: ShardedTensor, *, vocabulary: int) -> None:
    stored = metadata.state_dict_metadata[block.key]
    found = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else ()
    wanted = tuple(block.global_shape)
    # What Megatron lets differ in its rows is the vocabulary, whose padding follows from the tensor-parallel size.
    if found != ((vocabulary, *wanted[1:]) if block.allow_shape_mismatch else wanted):
        raise ValueError(
            f"{block.key} in {dist_ckpt} has shape {found}, this run's has {wanted}; set the model.path that the run "
            "began with, or another trainer.experiment_name to start from the beginning"
        )
