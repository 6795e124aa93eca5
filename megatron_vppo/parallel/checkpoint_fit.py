"""The checks that a checkpoint has what this rank will read of it, and that what was read are numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

from megatron_vppo.parallel.offload import optimizer_tensors
from megatron_vppo.parallel.training import Trainable
from megatron_vppo.weights.dist_metadata import DamagedCheckpoint, read_metadata
from megatron_vppo.weights.finite import non_finite
from megatron_vppo.weights.load import check_loaded, sharded_blocks


def check_fits(dist_ckpt: Path, sharded: dict[str, Any]) -> None:
    """Checks that a checkpoint holds everything of a state, in the same shapes.

    Args:
        sharded: the state of this rank as Megatron's loader takes it.

    Raises:
        DamagedCheckpoint: the checkpoint's description is damaged, or a file of it missing or too short.
        ValueError: it lacks something, or has a tensor of another shape.
    """
    metadata = read_metadata(dist_ckpt)
    for item in nested_values(sharded):
        if isinstance(item, ShardedObject):
            _check_key(dist_ckpt, metadata, item.unique_key)
        elif isinstance(item, ShardedTensor | ShardedTensorFactory):
            for block in sharded_blocks(item):
                _check_key(dist_ckpt, metadata, block.key)
                _check_shape(dist_ckpt, metadata, block)


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


def _check_key(dist_ckpt: Path, metadata: Metadata, key: str) -> None:
    if key not in metadata.state_dict_metadata:
        raise ValueError(
            f"{dist_ckpt} lacks {key}; set model.path, model.dtype and parallel.use_distributed_optimizer as the run "
            "began, or another trainer.experiment_name to start from the beginning"
        )


def _check_shape(dist_ckpt: Path, metadata: Metadata, block: ShardedTensor) -> None:
    stored = metadata.state_dict_metadata[block.key]
    found = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else ()
    if found != tuple(block.global_shape):
        raise ValueError(
            f"{block.key} in {dist_ckpt} has shape {found}, this run's has {tuple(block.global_shape)}; set the "
            "model.path that the run began with, or another trainer.experiment_name to start from the beginning"
        )
