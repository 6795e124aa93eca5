"""Hugging Face safetensors -> the parameters of one rank's model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import safe_open
from torch import nn

from megatron_vppo.models.weight_map import Entry, stage_entries

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class MappedModel(Protocol):
    """One pipeline stage of a model that has a weight map."""

    weight_map: tuple[Entry, ...]
    stage_layers: tuple[int, ...]
    stage: int
    groups: ProcessGroupCollection
    ignored_hf_names: Collection[str]
    canonical_hf_name: Callable[[str], str]

    def tensor_group(self, entry: Entry) -> dist.ProcessGroup: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@torch.no_grad()
def load_hf_weights(model: MappedModel, folder: str | Path) -> None:
    """Fills every parameter of this rank's pipeline stage, reading only this rank's part of each tensor.

    The folder holds `model.safetensors`, or shards with `model.safetensors.index.json`; names of released checkpoints
    or those that transformers 5 uses in memory.

    Raises:
        ValueError: a tensor is missing, has another shape than the configuration says, or is not part of the model.
    """
    checkpoint = _Checkpoint(Path(folder), model.canonical_hf_name)
    checkpoint.check_names(model.weight_map, model.ignored_hf_names)
    unfilled = dict(model.named_parameters())
    with checkpoint:
        for entry in stage_entries(model.weight_map, stage_layers=model.stage_layers, stage=model.stage):
            group = model.tensor_group(entry)
            parameter = unfilled.pop(entry.local_name(model.stage_layers))
            tensors = [checkpoint.lazy(name, shape) for name, shape in _names_and_shapes(entry)]
            local = entry.kind.shard(tensors, rank=group.rank(), size=group.size())
            if local.shape != parameter.shape:
                raise ValueError(
                    f"{entry.hf_names} give {tuple(local.shape)} on this rank, but the parameter "
                    f"{entry.template} has shape {tuple(parameter.shape)}"
                )
            parameter.copy_(local)
    if unfilled:
        raise ValueError(f"parameters without an entry in the weight map: {sorted(unfilled)}")


def _names_and_shapes(entry: Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from zip(entry.hf_names, entry.kind.hf_shapes(), strict=True)


class _Checkpoint:
    """The files of a folder, each opened once and mapped, not read."""

    def __init__(self, folder: Path, canonical_name: Callable[[str], str]) -> None:
        self._folder = folder
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()
        index = folder / _INDEX
        if index.is_file():
            listed = json.loads(index.read_text())["weight_map"]
            found = {name: folder / file for name, file in listed.items()}
            absent = sorted({str(path) for path in found.values() if not path.is_file()})
            if absent:
                raise ValueError(f"{index} names files that are not there: {absent}; download them again")
        elif (folder / _SINGLE).is_file():
            with safe_open(folder / _SINGLE, "pt") as file:
                found = {name: folder / _SINGLE for name in file.keys()}  # noqa: SIM118 (not a mapping)
        else:
            raise ValueError(f"{folder} holds neither {_SINGLE} nor {_INDEX}; give a folder in Hugging Face's format")
        self._where = {canonical_name(name): (path, name) for name, path in found.items()}

    def __enter__(self) -> _Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._files.clear()

    def check_names(self, entries: tuple[Entry, ...], ignored: Collection[str]) -> None:
        known = {name for entry in entries for name in entry.hf_names}
        missing = sorted(known - self._where.keys())
        unknown = sorted(self._where.keys() - known - set(ignored))
        if missing:
            raise ValueError(f"{self._folder} lacks {len(missing)} tensors of the model, first {missing[:5]}")
        if unknown:
            files = sorted({self._where[name][0].name for name in unknown})
            raise ValueError(
                f"{self._folder} has {len(unknown)} tensors that the model does not know, first {unknown[:5]} in "
                f"{files}; does config.json belong to these weights?"
            )

    def lazy(self, name: str, shape: tuple[int, ...]) -> Any:
        path, name_in_file = self._where[name]
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, "pt"))
        tensor = self._files[path].get_slice(name_in_file)
        found = tuple(tensor.get_shape())
        if found != shape:
            raise ValueError(f"{name_in_file} in {path} has shape {found}, the configuration says {shape}")
        return tensor
