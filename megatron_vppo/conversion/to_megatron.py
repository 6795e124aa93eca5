"""Hugging Face folder -> Megatron distributed checkpoint, piece by piece, so that little memory is needed.

The checkpoint is written with the same classes of torch.distributed.checkpoint that Megatron's own saving uses. The
place of each tensor in it was asked of the model (catalogue.py), so Megatron's loader can read it under any layout.
Tensors are stored in pieces of whole rows, as several tensor-parallel ranks would have stored them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_vppo.conversion.catalogue import read_catalogue
from megatron_vppo.conversion.dist_writer import (
    CheckpointShare,
    LazyPlanner,
    Piece,
    Rows,
    Shard,
    file_writer,
    write_share,
)
from megatron_vppo.conversion.places import StoredBlock, StoredEntry, rows_by_tensor
from megatron_vppo.conversion.read_ahead import PIECE_BYTES
from megatron_vppo.conversion.workers import OnBytes, run_shares, split_evenly
from megatron_vppo.observability.byte_progress import ByteProgress
from megatron_vppo.system.whole import exit_on_sigterm, whole_folder
from megatron_vppo.weights.config_files import copy_config_files, name_dtype
from megatron_vppo.weights.dist_metadata import BACKEND, DIST_CKPT
from megatron_vppo.weights.hf_folder import FileTensor, HfFolder

FILE_BYTES = 512 << 20
"""The size of each file at most. torch's writer holds one piece of every tensor until it has finished a file."""


def hf_to_megatron(source: Path, target: Path, *, dtype: torch.dtype | None = None, processes: int = 1) -> None:
    """Writes a folder to train from in place of `source`: `dist_ckpt/`, and all other files of the source.

    Call it where no process groups exist.

    Args:
        dtype: the dtype of the weights; None: as in the source.
        processes: the number of processes that share the work; each needs memory of its own.

    Raises:
        ValueError: the source is not a complete and supported model (the file and the tensor are named), the target
            exists, or the disk is full. Nothing is left under the target's name.
    """
    catalogue = read_catalogue(source)
    weights = HfFolder(source, catalogue.to_released_name)
    weights.check([stored.entry for stored in catalogue.entries], catalogue.hf_copies)
    pieces = [piece for stored in catalogue.entries for piece in pieces_of(stored, weights, dtype=dtype)]
    _check_one_dtype_per_key(pieces)
    total = sum(piece.nbytes for piece in pieces)
    with exit_on_sigterm(), whole_folder(target, num_bytes=total) as folder:
        copy_config_files(source, folder)
        name_dtype(folder, {piece.dtype for piece in pieces})
        progress = ByteProgress(f"writing {target.name}", total)
        _write(folder / DIST_CKPT, pieces, catalogue.object_keys, processes=processes, on_bytes=progress.add)
    progress.close()


def pieces_of(stored: StoredEntry, weights: HfFolder, *, dtype: torch.dtype | None) -> Iterator[Piece]:
    """Divides a parameter into pieces of about PIECE_BYTES, in the order of its rows."""
    tensors = weights.tensors(stored.entry)
    found = {tensor.dtype for tensor in tensors}
    if dtype is None and len(found) > 1:
        raise ValueError(f"{[t.name for t in tensors]} make one parameter but have dtypes {found}; give --dtype")
    sources = _row_sources if stored.entry.kind.stacks_rows else _shard_sources
    for block in stored.blocks:
        row = block.row
        for rows, source in sources(stored, tensors, block):
            offset, sizes = block.region(row, row + rows)
            yield Piece(block.key, block.size, offset, sizes, source, dtype or tensors[0].dtype)
            row += rows
        assert row == block.end


def _row_sources(
    stored: StoredEntry, tensors: Sequence[FileTensor], block: StoredBlock
) -> Iterator[tuple[int, Rows | Shard]]:
    """Finds (number of rows, source) for the parameter's rows in this block, in their order: rows of the tensors."""
    for number, begin, end in rows_by_tensor(block.row, block.end, [tensor.shape[0] for tensor in tensors]):
        for low, high in tensors[number].row_ranges(PIECE_BYTES, begin, end):
            yield high - low, Rows(tensors[number], low, high)


def _shard_sources(
    stored: StoredEntry, tensors: Sequence[FileTensor], block: StoredBlock
) -> Iterator[tuple[int, Rows | Shard]]:
    """Finds the same for rows in another order than the tensors': shards, as of several tensor-parallel ranks."""
    assert len(stored.blocks) == 1
    kind = stored.entry.kind
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    divisors = [n for n in range(1, kind.row_blocks + 1) if kind.row_blocks % n == 0]
    size = next((n for n in divisors if num_bytes <= n * PIECE_BYTES), kind.row_blocks)
    for rank in range(size):
        yield block.rows // size, Shard(kind, tuple(tensors), rank, size)


def _check_one_dtype_per_key(pieces: Iterable[Piece]) -> None:
    """Checks that all layers of a tower have one dtype: they are one tensor of the checkpoint."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces:
        if dtypes.setdefault(piece.key, piece.dtype) != piece.dtype:
            raise ValueError(f"{piece.key} has layers of dtypes {dtypes[piece.key]} and {piece.dtype}; give --dtype")


def _write(
    dist_ckpt: Path, pieces: Sequence[Piece], object_keys: Sequence[str], *, processes: int, on_bytes: OnBytes
) -> None:
    dist_ckpt.mkdir()
    planner, writer = LazyPlanner({}, on_bytes), file_writer(dist_ckpt)
    objects = SavePlan([WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in object_keys])
    plans = [objects, *(SavePlan([piece.write_item() for piece in file]) for file in _files(pieces))]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    by_index = {piece.write_item().index: piece for piece in pieces}
    shares = [
        CheckpointShare(
            dist_ckpt,
            tuple(run),
            {item.index: by_index[item.index] for plan in run for item in plan.items if item.tensor_data},
        )
        for run in split_evenly(plans, shares=processes, size=lambda plan: _plan_bytes(plan, by_index))
    ]
    written = run_shares(write_share, shares, on_bytes=on_bytes)
    writer.finish(metadata, [results for share in written for results in share])
    torch.save({}, dist_ckpt / "common.pt")  # Megatron keeps here what is not a tensor: nothing
    (dist_ckpt / "metadata.json").write_text(
        json.dumps(
            {
                "sharded_backend": BACKEND,
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )


def _files(pieces: Sequence[Piece]) -> list[list[Piece]]:
    files: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if filled + piece.nbytes > FILE_BYTES and files[-1]:
            files.append([])
            filled = 0
        files[-1].append(piece)
        filled += piece.nbytes
    return files


def _plan_bytes(plan: SavePlan, pieces: dict[MetadataIndex, Piece]) -> int:
    return sum(pieces[item.index].nbytes for item in plan.items if item.tensor_data)
