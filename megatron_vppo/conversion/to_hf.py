"""Distributed checkpoint -> Hugging Face folder, a few rows at a time, so that little memory is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_vppo.conversion.catalogue import read_catalogue
from megatron_vppo.conversion.dist_reader import StoredWeights
from megatron_vppo.conversion.hf_writer import EntryToFill, fill, lay_out
from megatron_vppo.conversion.workers import run_shares, split_evenly
from megatron_vppo.observability.byte_progress import ByteProgress
from megatron_vppo.system.whole import exit_on_sigterm, whole_folder
from megatron_vppo.weights.config_files import copy_config_files, name_dtype
from megatron_vppo.weights.dist_metadata import DIST_CKPT

SHARD_BYTES = 5 * 10**9
"""The size of each file at most, as transformers writes them."""


def megatron_to_hf(
    checkpoint: Path,
    target: Path,
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
    change: Callable[[Path], None] | None = None,
) -> None:
    """Writes a folder that transformers and vLLM load. Call it where no process groups exist.

    Args:
        checkpoint: a converted folder, or `checkpoints/global_step_N` of a run, whose optimizer state is left out.
        source: the Hugging Face folder to copy configuration, tokenizer and processor from; None: `checkpoint`.
        dtype: the dtype of the weights; None: as stored.
        shard_bytes: the size of a file at most; a larger tensor has a file of its own.
        processes: the number of processes that share the work; each needs memory of its own.
        change: changes the files next to the weights, before these are written.

    Raises:
        ValueError: the checkpoint is damaged, holds NaN or is that of another model, the target exists, or the disk is
            full. Nothing is left under the target's name.
    """
    if not (checkpoint / DIST_CKPT).is_dir():
        raise ValueError(
            f"{checkpoint} has no {DIST_CKPT}/; give a converted folder, or checkpoints/global_step_N of a run"
        )
    config_folder = source or checkpoint
    if source is None and not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} has no config.json; --source names the Hugging Face folder that has it")
    catalogue = read_catalogue(config_folder)
    weights = StoredWeights(checkpoint / DIST_CKPT)
    weights.check_keys(catalogue.keys)
    dtypes = [weights.check(stored) for stored in catalogue.entries]
    weights.check_records(catalogue.keys)
    if dtype is not None:
        dtypes = [dtype] * len(dtypes)
    shapes = [
        (name, shape, kept)
        for stored, kept in zip(catalogue.entries, dtypes, strict=True)
        for name, shape in zip(stored.entry.hf_names, stored.entry.kind.hf_shapes(), strict=True)
    ]
    total = sum(math.prod(shape) * kept.itemsize for _, shape, kept in shapes)
    with exit_on_sigterm(), whole_folder(target, num_bytes=total) as folder:
        copy_config_files(config_folder, folder)
        name_dtype(folder, dtypes)
        if change is not None:
            change(folder)
        tensors = lay_out(folder, shapes, shard_bytes=shard_bytes)
        filled = [
            EntryToFill(stored, tuple(tensors[name] for name in stored.entry.hf_names)) for stored in catalogue.entries
        ]
        progress = ByteProgress(f"writing {target.name}", total)
        shares = [
            (checkpoint / DIST_CKPT, tuple(run))
            for run in split_evenly(filled, shares=processes, size=lambda entry: entry.nbytes)
        ]
        run_shares(fill, shares, on_bytes=progress.add)
    progress.close()
