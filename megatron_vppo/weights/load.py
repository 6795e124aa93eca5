"""The loading of one rank's model, from a Hugging Face folder or a converted one, under any layout."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from torch.distributed.checkpoint import CheckpointException, Metadata

from megatron_vppo.system.agreement import on_every_rank
from megatron_vppo.weights.dist_metadata import (
    DIST_CKPT,
    DamagedCheckpoint,
    check_stored,
    naming,
    one_line,
    place_of,
    read_metadata,
)
from megatron_vppo.weights.dist_records import check_records
from megatron_vppo.weights.entries import Entry, stage_entries
from megatron_vppo.weights.finite import non_finite
from megatron_vppo.weights.hf_folder import HfFolder, has_hf_weights
from megatron_vppo.weights.load_hf import MappedModel, load_hf_weights
from megatron_vppo.weights.padding import sharded_blocks


class ShardedModel(MappedModel, Protocol):
    """A model with a weight map that can say where its parameters lie in a distributed checkpoint."""

    def sharded_state_dict(self) -> dict[str, Any]: ...


def load_weights(model: ShardedModel, folder: str | Path, *, replicas: dist.ProcessGroup | None = None) -> None:
    """Fills every parameter of this rank's model from a Hugging Face folder or a converted one.

    A collective over all ranks if the folder is a converted one, or if there are replicas.

    Args:
        replicas: the ranks that hold the same parameters as this one; None: it is the only one. Of a Hugging Face
            folder the first of them reads the files, and sends the parameters to the others.

    Raises:
        ValueError: the folder holds both kinds of weights, or neither, or those of another model.
    """
    folder = Path(folder)
    if is_converted(folder):
        load_dist_weights(model, folder / DIST_CKPT)
    elif replicas is None or replicas.size() == 1:
        load_hf_weights(model, folder)
    else:
        _load_on_one_replica(model, folder, replicas)


@torch.no_grad()
def _load_on_one_replica(model: ShardedModel, folder: Path, replicas: dist.ProcessGroup) -> None:
    """Reads every byte of the files once, however many replicas there are (docs/adr/0020-one-reader.md)."""
    reads = replicas.rank() == 0
    on_every_rank(lambda: load_hf_weights(model, folder) if reads else None)
    source = dist.get_global_rank(replicas, 0)
    for _, parameter in model.named_parameters():
        # As bytes: gloo does not send every dtype.
        dist.broadcast(parameter.reshape(-1).view(torch.uint8), src=source, group=replicas)


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
        check_dist_ckpt(folder / DIST_CKPT)
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
        ValueError: the checkpoint is damaged, lacks a tensor, has one of another shape or with NaN, or has an output
            layer of its own although the configuration ties it. All ranks raise the same.
    """
    sharded = _sharded_parameters(model)
    on_every_rank(partial(_check_fits, model, sharded, dist_ckpt))
    # Megatron's own check wants all ranks together to read everything, which fails if a rank holds several stages and
    # loads one after the other. That nothing is missing was seen above, tensor by tensor.
    loaded = load_sharded(sharded, dist_ckpt, validate_access_integrity=False)
    for name, parameter in model.named_parameters():
        parameter.copy_(loaded[name])  # where Megatron could fill the parameter itself, this copies it onto itself
    on_every_rank(partial(check_loaded, model, dist_ckpt))


def check_dist_ckpt(dist_ckpt: Path) -> Metadata:
    """Checks everything that Megatron's loader reads of a distributed checkpoint, except for the values of tensors.

    Raises:
        DamagedCheckpoint: something is missing or damaged; names the file.
    """
    metadata = read_metadata(dist_ckpt)
    check_records(dist_ckpt, metadata)
    try:
        maybe_load_config(str(dist_ckpt))
    except TypeError as error:  # a name that is none of the format's
        raise DamagedCheckpoint(f"{dist_ckpt / 'metadata.json'} is not that of a distributed checkpoint") from error
    _check_common(dist_ckpt, metadata)
    return metadata


def load_sharded(sharded: dict[str, Any], dist_ckpt: Path, *, validate_access_integrity: bool = True) -> dict[str, Any]:
    """Loads a state with Megatron's loader; a collective over all ranks.

    Raises:
        DamagedCheckpoint: a rank cannot read it. All ranks raise it.
    """
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            sharded, str(dist_ckpt), validate_access_integrity=validate_access_integrity
        )
    except CheckpointException as error:  # torch's: what each rank met with
        rank, (cause, _) = next(iter(error.failures.items()))
        raise DamagedCheckpoint(f"{dist_ckpt} cannot be loaded by rank {rank}: {one_line(cause)}") from error
    except CheckpointingException as error:  # Megatron's
        raise DamagedCheckpoint(f"{dist_ckpt} cannot be loaded: {one_line(error)}") from error
    return loaded


def check_loaded(model: ShardedModel, dist_ckpt: Path) -> None:
    """Checks the weights of this rank that were loaded from `dist_ckpt`.

    Raises:
        DamagedCheckpoint: one holds NaN or infinity; names it and its file.
    """
    for name, parameter in model.named_parameters():
        if non_finite(parameter):
            blocks = sharded_blocks(model.sharded_state_dict()[name])
            block, found = next((block, what) for block in blocks if (what := non_finite(block.data)))
            stacked = len(block.global_shape) - len(block.local_shape)
            sizes = (*(1,) * stacked, *block.local_shape)
            where = place_of(
                dist_ckpt, read_metadata(dist_ckpt), block.key, block.global_offset, sizes, stacked=stacked
            )
            raise DamagedCheckpoint(f"{where} holds {found}")


def _sharded_parameters(model: ShardedModel) -> dict[str, Any]:
    names = {name for name, _ in model.named_parameters()}
    return {name: item for name, item in model.sharded_state_dict().items() if name in names}


def _check_fits(model: ShardedModel, sharded: dict[str, Any], dist_ckpt: Path) -> None:
    """Checks on this rank that the checkpoint holds what it will read, and on rank 0 that nothing is damaged."""
    metadata = check_dist_ckpt(dist_ckpt) if dist.get_rank() == 0 else read_metadata(dist_ckpt)
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


def _check_common(dist_ckpt: Path, metadata: Metadata) -> None:
    """Checks the file of what is no tensor. Newer versions of Megatron (0.19) write it into the other files instead."""
    path = dist_ckpt / "common.pt"
    if any(key.startswith("common_state/") for key in metadata.state_dict_metadata) and not path.exists():
        return
    with naming(path):
        data = path.read_bytes()
    try:
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes are there: a broken pickle may raise anything
        raise DamagedCheckpoint(f"{path} is damaged: {type(error).__name__}") from error
    if not isinstance(held, dict):
        raise DamagedCheckpoint(f"{path} holds {type(held).__name__}, not a table")
