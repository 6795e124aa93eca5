"""Where each parameter of a model lies in a distributed checkpoint, asked of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_vppo.conversion.places import StoredEntry, StoredPart
from megatron_vppo.models.build import build_model
from megatron_vppo.models.read_config import read_hf_config
from megatron_vppo.parallel.layout import Layout, destroy_layout, init_layout
from megatron_vppo.weights.kinds import Entry, stream_entries
from megatron_vppo.weights.load import sharded_parts


@dataclass(frozen=True)
class ModelPlan:
    entries: tuple[StoredEntry, ...]
    """Every parameter once."""
    object_keys: tuple[str, ...]
    """Megatron's extra states, which are empty here; its own loader looks for them."""
    hf_copies: Mapping[str, str]
    """By name of a tensor that the model takes from another one, that one's name."""
    released_name: Callable[[str], str]


def plan_model(config_folder: Path) -> ModelPlan:
    """From `config.json` alone. To be called where there are no process groups yet.

    Raises:
        ValueError: no configuration, or one of a model that is not supported.
    """
    hf_config = read_hf_config(config_folder)
    with _alone() as layout:
        model = build_model(
            hf_config,
            groups=layout.groups,
            vision_groups=layout.vision_groups,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
        )
        sharded = model.sharded_state_dict()
        entries = tuple(
            _stored(entry, sharded.pop(entry.local_name(model.stage_layers)))
            for entry in stream_entries(model.weight_map)
        )
        objects = {name: item for name, item in sharded.items() if isinstance(item, ShardedObject)}
        assert len(objects) == len(sharded), f"not in the weight map: {sorted(sharded.keys() - objects.keys())}"
        # Where a tied head lies on another stage than the embedding, it is a layer with such a state of its own.
        tied_heads = [
            f"{entry.template.removesuffix('weight')}_extra_state/shard_0_1" for entry in model.weight_map if entry.copy
        ]
        return ModelPlan(
            entries=entries,
            object_keys=(*(item.unique_key for item in objects.values()), *tied_heads),
            hf_copies=model.hf_copies,
            released_name=model.released_name,
        )


@contextmanager
def _alone() -> Iterator[Layout]:
    """The process groups of a world of one, on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_layout(tensor=1, pipeline=1, timeout_seconds=60)
    finally:
        destroy_layout()


def _stored(entry: Entry, item: Any) -> StoredEntry:
    shape = entry.kind.local_shape(1)
    parts, row = [], 0
    for part in sharded_parts(item):
        rows = part.local_shape[0]
        assert tuple(part.local_shape[1:]) == shape[1:], f"{part.key} is cut along another dimension than its first"
        parts.append(
            StoredPart(
                part.key,
                tuple(part.global_shape),
                tuple(part.global_offset),
                row,
                rows,
                len(part.global_shape) - len(shape),
            )
        )
        row += rows
    assert row == shape[0], f"the parts of {entry.template} have {row} rows, it has {shape[0]}"
    return StoredEntry(entry, shape, tuple(parts))
