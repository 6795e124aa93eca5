"""The loading of one rank's model, from a Hugging Face folder or a converted one, under any layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vppo.weights.dist_metadata import DIST_CKPT, check_stored, read_metadata
from megatron_vppo.weights.entries import Entry, stage_entries
from megatron_vppo.weights.finite import check_finite
from megatron_vppo.weights.hf_folder import HfFolder, has_hf_weights
from megatron_vppo.weights.load_hf import MappedModel, load_hf_weights


class ShardedModel(MappedModel, Protocol):
    """A model with a weight map that can say where its parameters lie in a distributed checkpoint."""

    def sharded_state_dict(self) -> dict[str, Any]: ...


def load_weights(model: ShardedModel, folder: str | Path) -> None:
    """Fills every parameter of this rank's model from a Hugging Face folder or a converted one.

    A collective over all ranks if the folder is a converted one.

    Raises:
        ValueError: the folder holds both kinds of weights, or neither, or those of another model.
    """
    folder = Path(folder)
    if is_converted(folder):
        load_dist_weights(model, folder / DIST_CKPT)
    else:
        load_hf_weights(model, folder)


def is_converted(folder: Path) -> bool:
    """Returns True for a folder with a distributed checkpoint, False for one with safetensors files.

    Raises:
        ValueError: the folder holds both kinds of weights, or neither.
    """
    converted = (folder / DIST_CKPT).is_dir()
    if converted and has_hf_weights(folder):
        raise ValueError(f"{folder} holds both {DIST_CKPT}/ and safetensors files; remove one of them")
    if not converted and not has_hf_weights(folder):
        raise ValueError(
            f"{folder} holds no weights: neither model.safetensors, nor model.safetensors.index.json, nor {DIST_CKPT}/"
        )
    return converted


def check_weight_files(
    folder: Path, entries: Sequence[Entry], *, copies: Mapping[str, str], to_released_name: Callable[[str], str]
) -> None:
    """Checks what can be known about a folder's weights without reading them: files, names and shapes.

    Of a distributed checkpoint only the files are checked; what its tensors are called follows from the built model.

    Args:
        copies: see `HfFolder.check_names`.

    Raises:
        ValueError: as `load_weights`.
    """
    if is_converted(folder):
        read_metadata(folder / DIST_CKPT)
        return
    weights = HfFolder(folder, to_released_name)
    weights.check_names(entries, copies)
    for entry in entries:
        weights.tensors(entry)


@torch.no_grad()
def load_dist_weights(model: ShardedModel, dist_ckpt: Path) -> None:
    """Fills every parameter from a distributed checkpoint that any layout has written; a collective over all ranks.

    Only the tensors of parameters are read: Megatron's extra states are pickles, and those of our layers are empty.

    Raises:
        ValueError: the checkpoint is incomplete, lacks a tensor, has one of another shape, or has an output layer of
            its own although the configuration ties it; or a tensor holds NaN or infinity.
    """
    metadata = read_metadata(dist_ckpt)
    parameters = dict(model.named_parameters())
    sharded = {name: item for name, item in model.sharded_state_dict().items() if name in parameters}
    entries = stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.stage)
    kinds = {entry.local_name(model.stage_layers): entry.kind for entry in entries}
    for name, item in sharded.items():
        for block in sharded_blocks(item):
            check_stored(
                dist_ckpt,
                metadata,
                key=block.key,
                size=block.global_shape,
                unpadded_rows=kinds[name].unpadded_rows,
            )
    for entry in model.weight_map:
        if entry.is_copy and entry.template in metadata.state_dict_metadata:
            raise ValueError(f"{dist_ckpt} has {entry.template}, which config.json ties to {entry.hf_names[0]}")
    # Megatron's own check wants all ranks together to read everything, which fails if a rank holds several stages and
    # loads one after the other. That nothing is missing was seen above, tensor by tensor.
    loaded = dist_checkpointing.load(sharded, str(dist_ckpt), validate_access_integrity=False)
    for name, parameter in parameters.items():
        check_finite(loaded[name], name=name, where=dist_ckpt)
        parameter.copy_(loaded[name])  # where Megatron could fill the parameter itself, this copies it onto itself


def sharded_blocks(item: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Returns the blocks of rows in which Megatron stores a parameter: two for a gated projection, else one."""
    if not isinstance(item, ShardedTensorFactory):
        return [item]
    built = item.build()
    assert isinstance(built, list), f"{item.key} is not stored as blocks of rows"
    return built
