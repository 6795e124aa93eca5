"""Sharded weights of all ranks -> one stream of (Hugging Face name, whole tensor), and from there into a folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_vppo.config.choices import ModelPart
from megatron_vppo.system.whole import whole_folder
from megatron_vppo.weights.config_files import copy_config_files
from megatron_vppo.weights.entries import Entry, stream_entries
from megatron_vppo.weights.hf_folder import shard_name, write_index
from megatron_vppo.weights.load_hf import MappedModel
from megatron_vppo.weights.residence import require_resident


@torch.no_grad()
def hf_weights(stages: Sequence[MappedModel], *, without: Collection[ModelPart] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the checkpoint once, in the order of the model and whole on every rank.

    A collective over the tensor- and pipeline-parallel groups: their ranks must iterate together. Besides the tensors
    that the caller keeps, memory holds the shards of one entry at a time, of which QKV, gate and up, or the embedding
    is the largest. Tensors may be views of parameters, so copy what has to outlive the next optimizer step.

    Args:
        stages: the pipeline stages that this rank holds.
        without: the parts of the model to leave out.

    Raises:
        RuntimeError: the weights are offloaded (parallel/offload.py).
    """
    parameters = [dict(stage.named_parameters()) for stage in stages]
    require_resident((tensor for named in parameters for tensor in named.values()), what="export")
    for entry in stream_entries(stages[0].weight_map):
        if entry.part in without:
            continue
        shards = _gathered(_stage_shard(entry, stages, parameters), entry, stages[0])
        yield from zip(entry.hf_names, entry.kind.merge(shards), strict=True)
        del shards  # before the next entry is gathered


def _stage_shard(
    entry: Entry, stages: Sequence[MappedModel], parameters: Sequence[dict[str, torch.nn.Parameter]]
) -> Tensor:
    """Brings this tensor-parallel rank's shard from the pipeline rank that holds its stage."""
    model = stages[0]
    group = model.groups.pp
    nth, owner = divmod(entry.stage(model.stage_layers), group.size())
    if group.rank() == owner:
        shard = parameters[nth][entry.local_name(model.stage_layers)].detach()
    else:
        like = next(iter(parameters[0].values()))
        shape = entry.kind.local_shape(model.tensor_group(entry).size())
        shard = torch.empty(shape, dtype=like.dtype, device=like.device)
    if group.size() > 1:
        dist.broadcast(shard, src=dist.get_global_rank(group, owner), group=group)
    return shard


def _gathered(shard: Tensor, entry: Entry, model: MappedModel) -> Tensor:
    """Gathers [tensor-parallel ranks, *local shape]; [1, *shape] if all ranks have the same."""
    group = model.tensor_group(entry)
    if entry.kind.partition_dim is None or group.size() == 1:
        return shard[None]
    shards = shard.new_empty(group.size(), *shard.shape)
    dist.all_gather_into_tensor(shards.flatten(0, 1), shard.contiguous(), group=group)
    return shards


def save_hf(
    weights: Iterator[tuple[str, Tensor]], folder: Path, *, source: Path, is_writer: bool, shard_bytes: int = 2 << 30
) -> None:
    """Writes a folder that transformers and vLLM load: the weights, and all other files of the source folder.

    Every rank must iterate the weights; one writes. The folder appears under its name when it is whole; an older one
    stays until then.

    Args:
        source: the folder that training started from: config, tokenizer, processor, chat template.
        is_writer: True on the rank that writes.
        shard_bytes: the size of a file's weights; the writer holds as much in memory.

    Raises:
        ValueError: the folder cannot be made, is being written by another process, or the disk is full.
    """
    if not is_writer:
        for _ in weights:
            pass
        return
    with whole_folder(folder, replace=True) as unfinished:
        copy_config_files(source, unfinished)
        _write_files(weights, unfinished, shard_bytes=shard_bytes)


def _write_files(weights: Iterator[tuple[str, Tensor]], folder: Path, *, shard_bytes: int) -> None:
    """Writes files of about `shard_bytes`, and names them at the end: a name tells the number of all files."""
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        files.append(list(pending))
        save_file(pending, folder / _unnumbered(len(files)), metadata={"format": "pt"})
        pending.clear()

    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    where: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        final = shard_name(number, len(files))
        (folder / _unnumbered(number)).rename(folder / final)
        where.update(dict.fromkeys(names, final))
    if len(files) > 1:
        write_index(folder, where, total_bytes=total)


def _unnumbered(number: int) -> str:
    return f"model-{number:05d}.safetensors"
