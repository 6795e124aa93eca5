"""The loading of one rank's model from the safetensors files of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_vppo.weights.entries import Entry, stage_entries
from megatron_vppo.weights.hf_folder import HfFolder


class MappedModel(Protocol):
    """One pipeline stage of a model with a weight map, as far as this room needs to know it."""

    weight_map: tuple[Entry, ...]
    stage_layers: tuple[int, ...]
    stage: int
    groups: ProcessGroupCollection
    hf_copies: Mapping[str, str]
    to_released_name: Callable[[str], str]

    def tensor_group(self, entry: Entry) -> dist.ProcessGroup: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@torch.no_grad()
def load_hf_weights(model: MappedModel, folder: str | Path) -> None:
    """Fills every parameter of this rank's pipeline stage, and reads only this rank's share of each tensor.

    The folder holds `model.safetensors`, or several files and `model.safetensors.index.json`. Tensors are named as in
    released checkpoints or as transformers 5 names them in memory.

    Raises:
        ValueError: a tensor is missing, has another shape than the configuration says, does not belong to the model,
            or is a copy with other values.
    """
    weights = HfFolder(Path(folder), model.to_released_name)
    weights.check(model.weight_map, model.hf_copies)
    unfilled = dict(model.named_parameters())
    for entry in stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.stage):
        group = model.tensor_group(entry)
        parameter = unfilled.pop(entry.local_name(model.stage_layers))
        local = entry.kind.shard(weights.tensors(entry), rank=group.rank(), size=group.size())
        if local.shape != parameter.shape:
            raise ValueError(
                f"{entry.hf_names} give {tuple(local.shape)} on this rank, but the parameter "
                f"{entry.template} has shape {tuple(parameter.shape)}"
            )
        parameter.copy_(local)
    if unfilled:
        raise ValueError(f"parameters without an entry in the weight map: {sorted(unfilled)}")
