"""A catalogue of a model's parameters: for each, its weight map entry and its place in a distributed checkpoint.

The places are asked of the model itself, built on one rank without memory for its weights. So they are the ones that
Megatron's loader looks for, under any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_vppo.conversion.places import StoredBlock, StoredEntry
from megatron_vppo.models.build import build_model
from megatron_vppo.models.model_files import check_what_is_there
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.weights.entries import Entry, stream_entries
from megatron_vppo.weights.kinds import stored_shape
from megatron_vppo.weights.padding import sharded_blocks


@dataclass(frozen=True)
class Catalogue:
    entries: tuple[StoredEntry, ...]
    """Every parameter once, in the order of the model."""
    object_keys: tuple[str, ...]
    """The keys of Megatron's extra states. They are empty for our layers, but its loader looks for them."""
    hf_copies: Mapping[str, str]
    """The tensors that the model takes from another one: their names, each with that one's name."""
    to_released_name: Callable[[str], str]
    """Translates the name of a tensor in a file to that of the released checkpoint."""

    @property
    def keys(self) -> set[str]:
        """The names of all tensors of the distributed checkpoint."""
        return {block.key for stored in self.entries for block in stored.blocks}


def read_catalogue(config_folder: Path) -> Catalogue:
    """Makes the catalogue of the model that `config.json` describes. Call it where no process groups exist.

    Raises:
        ValueError: there is no configuration, its model is not supported, or other files of the folder contradict it.
    """
    hf_config = check_what_is_there(config_folder)
    with single_rank(backend="gloo") as layout:
        model = build_model(
            hf_config,
            groups=layout.groups,
            vision_groups=layout.vision_groups,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
        )
        sharded = model.sharded_state_dict()
        entries = tuple(
            _stored_entry(entry, sharded.pop(entry.local_name(model.stage_layers)))
            for entry in stream_entries(model.weight_map)
        )
        objects = {name: item for name, item in sharded.items() if isinstance(item, ShardedObject)}
        assert len(objects) == len(sharded), f"not in the weight map: {sorted(sharded.keys() - objects.keys())}"
        # A pipeline whose last stage holds a tied output layer of its own looks for the extra state of that layer.
        tied_heads = [
            f"{entry.template.removesuffix('weight')}_extra_state/shard_0_1"
            for entry in model.weight_map
            if entry.is_copy
        ]
        return Catalogue(
            entries=entries,
            object_keys=(*(item.unique_key for item in objects.values()), *tied_heads),
            hf_copies=model.hf_copies,
            to_released_name=model.to_released_name,
        )


def _stored_entry(entry: Entry, item: Any) -> StoredEntry:
    shape = stored_shape(entry.kind)
    blocks, row = [], 0
    for sharded in sharded_blocks(item):
        rows = sharded.local_shape[0]
        assert tuple(sharded.local_shape[1:]) == shape[1:], f"{sharded.key} is cut along a dimension other than rows"
        blocks.append(
            StoredBlock(
                key=sharded.key,
                size=tuple(sharded.global_shape),
                offset=tuple(sharded.global_offset),
                row=row,
                rows=rows,
                stacked=len(sharded.global_shape) - len(shape),
            )
        )
        row += rows
    assert row == shape[0], f"the blocks of {entry.template} have {row} rows, it has {shape[0]}"
    return StoredEntry(entry, shape, tuple(blocks))
