"""Distributed checkpoint -> Hugging Face folder, as many bytes at a time as fit a small buffer."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megatron_vppo.conversion.catalogue import plan_model
from megatron_vppo.conversion.hf_files import FilledEntry, fill, lay_out
from megatron_vppo.conversion.stored import StoredWeights
from megatron_vppo.conversion.workers import run_parts, split_evenly
from megatron_vppo.observability.byte_progress import ByteProgress
from megatron_vppo.system.whole import unfinished_folder
from megatron_vppo.weights.config_files import copy_config_files, name_dtype
from megatron_vppo.weights.dist_metadata import DIST_CKPT

SHARD_BYTES = 5 * 10**9
"""Of each file, as transformers writes them."""


def megatron_to_hf(
    checkpoint: Path,
    target: Path,
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
) -> None:
    """Writes a folder that transformers and vLLM load. To be called where there are no process groups.

    Args:
        checkpoint: a converted folder, or `checkpoints/global_step_N` of a run, whose optimizer state stays behind.
        source: the Hugging Face folder that configuration, tokenizer and processor come from; None: `checkpoint`.
        dtype: None: as stored.
        shard_bytes: of a file at most; a larger tensor has one for itself.

    Raises:
        ValueError: the checkpoint is incomplete or another model's, the target exists, or the disk is full. Nothing is
            left under the target's name.
    """
    if not (checkpoint / DIST_CKPT).is_dir():
        raise ValueError(f"{checkpoint} has no {DIST_CKPT}/; give a converted folder, or one named global_step_N")
    config_folder = source or checkpoint
    if source is None and not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} has no config.json; --source names the Hugging Face folder that has it")
    plan = plan_model(config_folder)
    weights = StoredWeights(checkpoint / DIST_CKPT)
    weights.check_keys({part.key for stored in plan.entries for part in stored.parts})
    dtypes = [weights.check(stored) for stored in plan.entries]
    if dtype is not None:
        dtypes = [dtype] * len(dtypes)
    shapes = [
        (name, shape, kept)
        for stored, kept in zip(plan.entries, dtypes, strict=True)
        for name, shape in zip(stored.entry.hf_names, stored.entry.kind.hf_shapes(), strict=True)
    ]
    total = sum(math.prod(shape) * kept.itemsize for _, shape, kept in shapes)
    with unfinished_folder(target, num_bytes=total) as folder:
        copy_config_files(config_folder, folder)
        name_dtype(folder, dtypes)
        places = lay_out(folder, shapes, shard_bytes=shard_bytes)
        filled = [FilledEntry(stored, tuple(places[name] for name in stored.entry.hf_names)) for stored in plan.entries]
        progress = ByteProgress(f"writing {target.name}", total)
        parts = [
            (checkpoint / DIST_CKPT, tuple(run))
            for run in split_evenly(filled, parts=processes, size=lambda entry: entry.nbytes)
        ]
        run_parts(fill, parts, on_bytes=progress.add)
    progress.close()
