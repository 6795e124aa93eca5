"""The room that checkpoints need, compared with what is free before a run begins."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from megatron_vppo.config.schema import RunConfig
from megatron_vppo.models.families import family_of, weight_map
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.setup.run_folder import RunFolder
from megatron_vppo.system.whole import RESERVE_BYTES
from megatron_vppo.weights.entries import stream_entries

_FLOAT32 = 4


def checkpoint_bytes(config: RunConfig, hf_config: HfConfig) -> int:
    """Counts the bytes of a checkpoint's tensors."""
    values = trained = 0
    for entry in stream_entries(weight_map(hf_config, family=family_of(hf_config))):
        count = sum(math.prod(shape) for shape in entry.kind.hf_shapes())
        values += count
        trained += 0 if entry.part in config.model.freeze else count
    return bytes_of_values(config, values=values, trained=trained)


def bytes_of_values(config: RunConfig, *, values: int, trained: int) -> int:
    """Counts the bytes of a checkpoint of `values` values, of which `trained` are trained.

    It has the weights; of trained ones also two fp32 moments, and fp32 weights if the model's are bfloat16.
    trainer.save_model_only leaves all but the model's weights out.
    """
    weight = 2 if config.model.dtype == "bfloat16" else _FLOAT32
    state = 0 if config.trainer.save_model_only else 2 * _FLOAT32 + (_FLOAT32 if weight < _FLOAT32 else 0)
    return values * weight + trained * state


def existing_folder(config: RunConfig) -> Path:
    """Returns the run folder, or the nearest folder above it that is there."""
    root = RunFolder.of(config.trainer).root.absolute()
    return next(folder for folder in (root, *root.parents) if folder.is_dir())


def check_disk(config: RunConfig, hf_config: HfConfig) -> None:
    """Refuses a run folder with less room than one checkpoint.

    An old checkpoint is deleted when the new one is whole, so two lie there for a while; the one that is there already
    is not free space. Quotas are not seen.

    Raises:
        ValueError: the file system has less; the message has both numbers.
    """
    root, there = RunFolder.of(config.trainer).root.absolute(), existing_folder(config)
    needed, free = checkpoint_bytes(config, hf_config) + RESERVE_BYTES, _free_bytes(there)
    if free < needed:
        raise ValueError(
            f"{root}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, or set "
            "another trainer.runs_dir"
        )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
