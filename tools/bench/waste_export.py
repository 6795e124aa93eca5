"""Bar 10 of waste.py: bytes that the trainer writes to send its weights, and the round trips to an engine.

The sender is real; behind it there is no engine. What an engine writes is counted by waste_engine.py.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.waste_bars import Bar, Case
from bench.waste_policy import FAMILIES, FamilyName, make_stage, small_config
from bench.written_bytes import WrittenBytes
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.parallel.layout import Layout, init_layout
from megatron_vppo.planning.published import PUBLISHED, published_config
from megatron_vppo.rollout.records import LiveWeight
from megatron_vppo.rollout.transfer.bundle import TransferBuffer, WholeTensor
from megatron_vppo.rollout.transfer.shared_buffer import SharedBuffer
from megatron_vppo.rollout.transfer.vllm_layout import FUSED, PREFIXES, canonical_name
from megatron_vppo.rollout.transfer.weight_sender import BUFFER_BYTES, WeightSender
from megatron_vppo.weights.entries import stream_entries
from megatron_vppo.weights.stream import hf_weights

WRITTEN = {1: 1.05, 2: 1.1}
"""The limits of the bytes written over those of the model, by the number of tensor-parallel ranks."""
BYTES_OF_TRIP = 2 << 30
SMALL_BUFFER = 8 << 20


def export() -> list[Bar]:
    """Counts bar 10."""
    words = "Bytes that the leading trainer rank writes to send its weights, over those of the model; round trips"
    return [Bar(10, words, (*_written(1), *_written(2), *map(_round_trips, PUBLISHED)))]


class NoEngine:
    """A session that takes every buffer at once."""

    def start_weight_update(self) -> None: ...

    def begin_update_weights(self, update_info: dict[str, Any]) -> None: ...

    def end_update_weights(self) -> None: ...

    def finish_weight_update(self, weight_version: str) -> None: ...

    def abort_weight_update(self) -> None: ...

    def live_digests(self) -> list[dict[str, str]]:
        return []


class NoMemory:
    """A buffer that is only a size."""

    capacity, free_bytes = 0, 1 << 40

    def grow(self, capacity: int) -> None:
        self.capacity = max(self.capacity, capacity)

    def room(self, offset: int, num_values: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_values, dtype=dtype, device="meta")

    def publish(self) -> dict[str, Any]:
        return {}

    def free(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class WholeTensors:
    """A stream of tensors without memory, which says how large they are."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def piece_bytes(self) -> Sequence[int]:
        return [2 * math.prod(shape) for shape in self.shapes.values()]

    def pieces(self) -> Iterator[WholeTensor]:
        for name, shape in self.shapes.items():
            yield WholeTensor(name, torch.empty(shape, dtype=torch.bfloat16, device="meta"))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def __next__(self) -> tuple[str, Tensor]:
        raise StopIteration


def _sender(
    names: Sequence[str], buffers: tuple[TransferBuffer, TransferBuffer], *, buffer_bytes: int = BUFFER_BYTES
) -> WeightSender:
    return WeightSender(
        NoEngine(), buffers=buffers, buffer_bytes=buffer_bytes, workers=[live_weights(names)], dtype=torch.bfloat16
    )


def live_weights(names: Sequence[str]) -> list[LiveWeight]:
    """Returns the parameters that a vLLM engine makes of the tensors of a checkpoint."""
    fused = {part: whole for whole, parts in FUSED.items() for part in parts}
    parameters: dict[str, None] = {}
    for name in map(canonical_name, names):
        *path, layer, leaf = name.split(".")
        joined = ".".join([*path, fused.get(layer, layer), leaf])
        of_vllm, released = next(prefix for prefix in PREFIXES if joined.startswith(prefix[1]))
        parameters[of_vllm + joined.removeprefix(released)] = None
    return [LiveWeight(name, parameter=name, repacked=False, kv_replicas=1) for name in parameters]


# --- Bytes ------------------------------------------------------------------------------------------------------------


def _written(ranks: int) -> list[Case]:
    with tempfile.TemporaryDirectory(prefix="vppo-waste-") as folder:
        mp.spawn(_rank, args=(ranks, folder), nprocs=ranks)
        return [Case(**case) for case in json.loads((Path(folder) / "cases.json").read_text(encoding="utf-8"))]


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    layout = init_layout(tensor=ranks, pipeline=1, timeout_seconds=60)
    cases = [vars(_written_share(family, layout)) for family in FAMILIES]
    if rank == 0:
        (Path(folder) / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _written_share(family: FamilyName, layout: Layout) -> Case:
    stage = make_stage(small_config(family), layout)
    names = [name for entry in stream_entries(stage.weight_map) for name in entry.hf_names]
    sender = _sender(names, (SharedBuffer(), SharedBuffer()), buffer_bytes=SMALL_BUFFER)
    with WrittenBytes() as written:
        report = sender.send(hf_weights([stage]), version=0, verify=False)
    sender.close()
    ranks = layout.tensor
    return Case(f"bytes, {family}, {ranks} tensor-parallel ranks", written.bytes / report.num_bytes, WRITTEN[ranks])


# --- Round trips ------------------------------------------------------------------------------------------------------


def _round_trips(model: str) -> Case:
    """Counts the buffers that a released model fills, in bfloat16."""
    config = published_config(model)
    entries = stream_entries(weight_map(config, family=family_of(config)))
    shapes = {
        name: shape for entry in entries for name, shape in zip(entry.hf_names, entry.kind.hf_shapes(), strict=True)
    }

    sender = _sender(list(shapes), (NoMemory(), NoMemory()))
    report = sender.send(WholeTensors(shapes), version=0, verify=False)
    return Case(f"round trips, {model}", report.num_buffers, report.num_bytes / BYTES_OF_TRIP + 1)
