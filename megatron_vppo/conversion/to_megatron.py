"""Hugging Face folder -> Megatron distributed checkpoint, as many bytes at a time as fit a small buffer.

The checkpoint is written with the parts of torch.distributed.checkpoint that Megatron's own saving uses. Where each
tensor lies in it was asked of the model (plan.py), so it is what Megatron's loader reads under any layout. Tensors are
stored in pieces of whole rows, as several tensor-parallel ranks would have stored them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_vppo.conversion.catalogue import plan_model
from megatron_vppo.conversion.pieces import FilePart, LazyPlanner, Piece, Rows, Shard, file_writer, write_files
from megatron_vppo.conversion.places import StoredEntry, StoredPart
from megatron_vppo.conversion.workers import Report, run_parts, split_evenly
from megatron_vppo.observability.byte_progress import ByteProgress
from megatron_vppo.system.whole import unfinished_folder
from megatron_vppo.weights.config_files import copy_config_files, name_dtype
from megatron_vppo.weights.dist_metadata import BACKEND, DIST_CKPT
from megatron_vppo.weights.hf_folder import HfFolder, LazyTensor
from megatron_vppo.weights.kinds import FusedQKV, Gated, GroupedQKV, Kind, Split, Vocabulary

PIECE_BYTES = 16 << 20
"""Rows that are gathered in memory at a time, while as many are being read. glibc keeps and reuses blocks of up to 32
MiB; larger ones it takes from the kernel each time, page by page, which costs as much as copying them."""
FILE_BYTES = 512 << 20
"""Of each file. torch's writer holds one piece of every tensor until it has finished a file."""


def hf_to_megatron(source: Path, target: Path, *, dtype: torch.dtype | None = None, processes: int = 1) -> None:
    """Writes a folder that training starts from as from `source`: `dist_ckpt/`, and all other files of the source.

    To be called where there are no process groups.

    Args:
        dtype: None: as in the source.
        processes: that share the work; each needs memory of its own.

    Raises:
        ValueError: the source is not a whole and supported model (the file and the tensor are named), the target
            exists, or the disk is full. Nothing is left under the target's name.
    """
    plan = plan_model(source)
    weights = HfFolder(source, plan.released_name)
    weights.check([stored.entry for stored in plan.entries], plan.hf_copies)
    pieces = [piece for stored in plan.entries for piece in pieces_of(stored, weights, dtype=dtype)]
    _check_one_dtype_per_key(pieces)
    total = sum(piece.nbytes for piece in pieces)
    with unfinished_folder(target, num_bytes=total) as folder:
        copy_config_files(source, folder)
        name_dtype(folder, {piece.dtype for piece in pieces})
        progress = ByteProgress(f"writing {target.name}", total)
        _write(folder / DIST_CKPT, pieces, plan.object_keys, processes=processes, on_bytes=progress.add)
    progress.close()


def pieces_of(stored: StoredEntry, weights: HfFolder, *, dtype: torch.dtype | None) -> Iterator[Piece]:
    """A parameter in pieces of about PIECE_BYTES, in the order of its rows."""
    tensors = weights.tensors(stored.entry)
    found = {tensor.dtype for tensor in tensors}
    if dtype is None and len(found) > 1:
        raise ValueError(f"{[t.name for t in tensors]} make one parameter but have dtypes {found}; give --dtype")
    for part in stored.parts:
        for low, high, source in _sources(stored, tensors, part):
            offset, sizes = part.block(low, high)
            yield Piece(part.key, part.size, offset, sizes, source, dtype or tensors[0].dtype)


def _sources(
    stored: StoredEntry, tensors: tuple[LazyTensor, ...], part: StoredPart
) -> Iterator[tuple[int, int, Rows | Shard]]:
    """(first row, end, where they come from), over the parameter's rows in this part."""
    kind, end = stored.entry.kind, part.row + part.rows
    if isinstance(kind, Vocabulary | Split | Gated):  # the rows of one tensor after those of another
        first = 0
        for tensor in tensors:
            low, high = max(first, part.row), min(first + tensor.shape[0], end)
            step = max(1, PIECE_BYTES * tensor.shape[0] // tensor.nbytes)
            for row in range(low, high, step):
                to = min(row + step, high)
                yield row, to, Rows(tensor, row - first, to - first)
            first += tensor.shape[0]
        return
    assert len(stored.parts) == 1
    size = _shards(kind, sum(tensor.nbytes for tensor in tensors))
    rows = part.rows // size
    for rank in range(size):
        yield rank * rows, (rank + 1) * rows, Shard(kind, tensors, rank, size)


def _shards(kind: Kind, num_bytes: int) -> int:
    """How many shards a parameter of reordered rows is made in; its heads have to stay whole."""
    heads = kind.kv_heads if isinstance(kind, GroupedQKV) else kind.heads if isinstance(kind, FusedQKV) else 1
    return next((n for n in range(1, heads) if heads % n == 0 and num_bytes <= n * PIECE_BYTES), heads)


def _check_one_dtype_per_key(pieces: Iterable[Piece]) -> None:
    """The layers of a tower are one tensor of the checkpoint, which has one dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces:
        if dtypes.setdefault(piece.key, piece.dtype) != piece.dtype:
            raise ValueError(f"{piece.key} has layers of dtypes {dtypes[piece.key]} and {piece.dtype}; give --dtype")


def _write(
    dist_ckpt: Path, pieces: Sequence[Piece], object_keys: Sequence[str], *, processes: int, on_bytes: Report
) -> None:
    dist_ckpt.mkdir()
    planner, writer = LazyPlanner({}, on_bytes), file_writer(dist_ckpt)
    objects = SavePlan([WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in object_keys])
    plans = [objects, *(SavePlan([piece.write_item() for piece in file]) for file in _files(pieces))]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    by_index = {piece.write_item().index: piece for piece in pieces}
    parts = [
        FilePart(dist_ckpt, tuple(run), {i.index: by_index[i.index] for p in run for i in p.items if i.tensor_data})
        for run in split_evenly(plans, parts=processes, size=lambda plan: _plan_bytes(plan, by_index))
    ]
    written = run_parts(write_files, parts, on_bytes=on_bytes)
    writer.finish(metadata, [results for part in written for results in part])
    torch.save({}, dist_ckpt / "common.pt")  # what Megatron keeps beside tensors: nothing here
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
