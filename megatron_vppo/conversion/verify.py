"""The comparison of a conversion with its source, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_vppo.conversion.catalogue import Catalogue, read_catalogue
from megatron_vppo.conversion.dist_reader import StoredWeights
from megatron_vppo.conversion.places import StoredEntry, rows_by_tensor
from megatron_vppo.conversion.read_ahead import PIECE_BYTES, read_ahead
from megatron_vppo.observability.byte_progress import ByteProgress
from megatron_vppo.weights.dist_metadata import DIST_CKPT
from megatron_vppo.weights.hf_folder import FileTensor, HfFolder
from megatron_vppo.weights.kinds import merge
from megatron_vppo.weights.load import check_dist_ckpt

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison."""

    tensors: int
    """The number of the source's tensors, all of which were compared."""
    num_bytes: int
    """The bytes of the source's tensors."""
    differing: tuple[str, ...]
    """The names of the tensors in which a bit differs."""
    casts: tuple[str, ...]
    """The casts of the source where the other side has another dtype, such as 'float32 -> bfloat16'."""
    copies: tuple[str, ...]
    """The names of tensors that the source holds although they are tied to another tensor, which they equal. A
    conversion leaves them out."""


def compare_checkpoints(source: Path, other: Path) -> Comparison:
    """Compares every tensor of a Hugging Face folder with a converted folder, or with another Hugging Face folder.

    A converted folder is checked in both directions: its Megatron parameters against those made from the source, and
    the tensors that an export would write against the source's. It builds a layout of one rank for itself, so call it
    where no process groups exist.

    Raises:
        ValueError: one of them is incomplete, or a tensor is missing, unknown or there twice.
    """
    catalogue = read_catalogue(source)
    weights = HfFolder(source, catalogue.to_released_name)
    copies = weights.check([stored.entry for stored in catalogue.entries], catalogue.hf_copies)
    is_converted = (other / DIST_CKPT).is_dir()
    compare = _stored_side(other / DIST_CKPT, catalogue) if is_converted else _hf_side(other, catalogue)
    differing: dict[str, None] = {}
    casts: dict[str, None] = {}
    sources = [(stored, weights.tensors(stored.entry)) for stored in catalogue.entries]
    total = sum(tensor.nbytes for _, tensors in sources for tensor in tensors)
    progress = ByteProgress(f"comparing {other.name}", total)
    for pair in read_ahead(pair for stored, tensors in sources for pair in compare(stored, tensors)):
        if pair.source.dtype != pair.other.dtype:
            casts[f"{pair.source.dtype} -> {pair.other.dtype}".replace("torch.", "")] = None
        if not _equal_bits(pair.source.to(pair.other.dtype), pair.other):
            differing[pair.name] = None
        progress.add(pair.progress)
    progress.close()
    compared = sum(len(tensors) for _, tensors in sources)
    return Comparison(compared, total, tuple(differing), tuple(casts), copies)


@dataclass(frozen=True)
class _Pair:
    """The same rows of one tensor from both sides."""

    name: str
    source: Tensor
    other: Tensor
    progress: int
    """The bytes of the source that have been compared once this pair is."""


_Compare = Callable[[StoredEntry, tuple[FileTensor, ...]], Iterator[_Pair]]
"""A function from a parameter and the source's tensors to the rows of both sides."""


def _stored_side(dist_ckpt: Path, catalogue: Catalogue) -> _Compare:
    check_dist_ckpt(dist_ckpt)
    weights = StoredWeights(dist_ckpt)
    weights.check_keys(catalogue.keys)
    for stored in catalogue.entries:
        weights.check(stored)
    return partial(_with_stored, weights)


def _hf_side(folder: Path, catalogue: Catalogue) -> _Compare:
    weights = HfFolder(folder, catalogue.to_released_name)
    weights.check([stored.entry for stored in catalogue.entries], catalogue.hf_copies)
    return lambda stored, tensors: _with_hf(tensors, weights.tensors(stored.entry))


def _with_stored(weights: StoredWeights, stored: StoredEntry, tensors: tuple[FileTensor, ...]) -> Iterator[_Pair]:
    names, kind = stored.entry.hf_names, stored.entry.kind
    if not kind.stacks_rows:
        parameter = torch.cat([weights.rows(block, block.row, block.end) for block in stored.blocks])
        yield _Pair(names[0], kind.shard(tensors, rank=0, size=1), parameter, 0)
        for name, tensor, back in zip(names, tensors, merge(kind, parameter[None]), strict=True):
            yield _Pair(name, tensor[:], back, tensor.nbytes)
        return
    # The rows of the parameter are those of the tensors, so both directions are one comparison.
    heights = [tensor.shape[0] for tensor in tensors]
    for block in stored.blocks:
        for low, high in weights.row_ranges(block, num_bytes=PIECE_BYTES):
            rows, done = weights.rows(block, low, high), 0
            for number, begin, end in rows_by_tensor(low, high, heights):
                source = tensors[number][begin:end]
                yield _Pair(names[number], source, rows[done : done + end - begin], source.nbytes)
                done += end - begin


def _with_hf(tensors: tuple[FileTensor, ...], others: tuple[FileTensor, ...]) -> Iterator[_Pair]:
    for tensor, other in zip(tensors, others, strict=True):
        for low, high in tensor.row_ranges(PIECE_BYTES):
            rows = tensor[low:high]
            yield _Pair(tensor.name, rows, other[low:high], rows.nbytes)


def _equal_bits(left: Tensor, right: Tensor) -> bool:
    bits = _BITS[left.dtype.itemsize]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))
