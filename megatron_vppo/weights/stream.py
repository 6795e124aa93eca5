"""Sharded weights of all ranks -> one stream of (Hugging Face name, whole tensor), and from there into a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
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


class WeightStream(Iterator[tuple[str, Tensor]]):
    """Every tensor of the checkpoint once, in the order of the model: (Hugging Face name, whole tensor).

    Iterating is a collective over the tensor- and pipeline-parallel groups: their ranks must iterate together. Besides
    the tensors that the caller keeps, memory holds the shards of one entry at a time, of which QKV, gate and up, or the
    embedding is the largest. Tensors may be views of parameters, so copy what has to outlive the next optimizer step.

    `pieces` is the same stream for a caller who says where the shards are to be gathered. Both may be mixed: either
    goes on where the other stopped.
    """

    def __init__(self, stages: Sequence[MappedModel], *, without: Collection[ModelPart] = ()) -> None:
        """
        Args:
            stages: the pipeline stages that this rank holds.
            without: the parts of the model to leave out.
        """
        self._stages = stages
        self._parameters = [dict(stage.named_parameters()) for stage in stages]
        self._entries = [entry for entry in stream_entries(stages[0].weight_map) if entry.part not in without]
        self._coming = iter(self._entries)
        self._open: WeightPiece | None = None
        self._whole = self._whole_tensors()

    @property
    def piece_bytes(self) -> tuple[int, ...]:
        """The bytes that each piece takes, those that have passed included."""
        return tuple(self._piece(entry).nbytes for entry in self._entries)

    def pieces(self) -> Iterator[WeightPiece]:
        """Yields one entry after the other. One that is not gathered when the next is asked for is gathered then.

        Raises:
            RuntimeError: the weights are offloaded (parallel/offload.py).
        """
        require_resident((tensor for named in self._parameters for tensor in named.values()), what="export")
        for entry in self._coming:
            self._finish()
            self._open = self._piece(entry)
            yield self._open
        self._finish()

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._whole)

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for piece in self.pieces():
            for name, shape, view in zip(piece.names, piece.shapes, piece.gather(), strict=True):
                yield name, view.reshape(shape)
            del view  # before the next piece is gathered

    def _finish(self) -> None:
        """Takes part in a collective that this rank has no use for any more: other ranks may wait in it."""
        if self._open is not None and not self._open.is_gathered:
            self._open.gather()
        self._open = None

    def _piece(self, entry: Entry) -> WeightPiece:
        model = self._stages[0]
        nth, owner = divmod(entry.stage(model.stage_layers), model.groups.pp.size())
        own = None
        if model.groups.pp.rank() == owner:
            own = self._parameters[nth][entry.local_name(model.stage_layers)].detach()
        like = next(iter(self._parameters[0].values()))
        return WeightPiece(entry, own, owner=owner, model=model, dtype=like.dtype, device=like.device)


class WeightPiece:
    """One entry of the weight map on its way out: tensors that are gathered together."""

    def __init__(
        self,
        entry: Entry,
        own: Tensor | None,
        *,
        owner: int,
        model: MappedModel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            own: this rank's shard, if its pipeline stage holds the entry.
            owner: the number of the pipeline rank that holds it.
        """
        group = model.tensor_group(entry)
        self.names = entry.hf_names
        self.shapes = entry.kind.hf_shapes()
        self.dtype = dtype
        self.is_gathered = False
        self._kind, self._own, self._owner = entry.kind, own, owner
        self._pipeline, self._tensor = model.groups.pp, group
        ranks = 1 if entry.kind.partition_dim is None else group.size()
        self._shape = (ranks, *entry.kind.local_shape(group.size()))
        self._device = device

    @property
    def num_values(self) -> int:
        """The values of all shards, padding included."""
        return math.prod(self._shape)

    @property
    def nbytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    @torch.no_grad()
    def gather(self, room: Tensor | None = None) -> list[Tensor]:
        """Brings the shards of all tensor-parallel ranks together; a collective as the stream's.

        Args:
            room: memory to gather into, [num_values] of `dtype`, on any device; None: new memory, or the parameter's
                own if nothing has to be gathered.

        Returns:
            One view for each tensor, of `room` if it is given: `reshape` to its shape gives the tensor.
        """
        assert not self.is_gathered, f"{self.names} are gathered already"
        self.is_gathered = True
        if self._own is not None and self._shape[0] == 1:
            self._broadcast(self._own)
            views = list(self._kind.views(self._own[None]))
            return views if room is None else _copied(views, room)
        if room is None or room.device != self._device:
            shards = torch.empty(self._shape, dtype=self.dtype, device=self._device)
            self._gather_into(shards)
            if room is not None:
                shards = room.view(self._shape).copy_(shards)
        else:
            shards = room.view(self._shape)
            self._gather_into(shards)
        return list(self._kind.views(shards))

    def _gather_into(self, shards: Tensor) -> None:
        """Writes every value of [tensor-parallel ranks, *local shape] once: what is received comes into its place."""
        ranks = len(shards)
        shard = shards[self._tensor.rank() if ranks > 1 else 0] if self._own is None else self._own
        self._broadcast(shard)
        if ranks > 1:
            dist.all_gather_into_tensor(shards.flatten(0, 1), shard, group=self._tensor)

    def _broadcast(self, shard: Tensor) -> None:
        """Brings this tensor-parallel rank's shard from the pipeline rank that holds it."""
        if self._pipeline.size() > 1:
            source = dist.get_global_rank(self._pipeline, self._owner)
            dist.broadcast(shard, src=source, group=self._pipeline)


def _copied(views: Sequence[Tensor], room: Tensor) -> list[Tensor]:
    """Copies tensors into `room` one after the other, in the order of their values."""
    parts = room[: sum(view.numel() for view in views)].split([view.numel() for view in views])
    return [part.view(view.shape).copy_(view) for part, view in zip(parts, views, strict=True)]


def hf_weights(stages: Sequence[MappedModel], *, without: Collection[ModelPart] = ()) -> WeightStream:
    """Returns the present weights under their Hugging Face names; see WeightStream."""
    return WeightStream(stages, without=without)


def save_hf(
    weights: Iterator[tuple[str, Tensor]],
    folder: Path,
    *,
    source: Path,
    is_writer: bool,
    shard_bytes: int = 2 << 30,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a folder that transformers and vLLM load: the weights, and all other files of the source folder.

    Every rank must iterate the weights; one writes. The folder appears under its name when it is whole; an older one
    stays until then.

    Args:
        source: the folder that training started from: config, tokenizer, processor, chat template.
        is_writer: True on the rank that writes.
        shard_bytes: the size of a file's weights; the writer holds as much in memory.
        finish: writes what is to be different from the source, before the folder gets its name.

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
        if finish is not None:
            finish(unfinished)


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
