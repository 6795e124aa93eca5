"""Whether a converted checkpoint is its source, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_vppo.conversion.catalogue import ModelPlan, plan_model
from megatron_vppo.conversion.hf_files import PIECE_BYTES
from megatron_vppo.conversion.places import StoredEntry
from megatron_vppo.conversion.read_ahead import read_ahead
from megatron_vppo.conversion.stored import StoredWeights
from megatron_vppo.observability.byte_progress import ByteProgress
from megatron_vppo.weights.dist_metadata import DIST_CKPT
from megatron_vppo.weights.hf_folder import HfFolder, LazyTensor
from megatron_vppo.weights.kinds import Gated, Split, Vocabulary

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Comparison:
    tensors: int
    """Compared, under the names of the source; each name once."""
    num_bytes: int
    """Of the source."""
    differing: tuple[str, ...]
    """Names of the tensors with at least one differing bit."""
    casts: tuple[str, ...]
    """Such as 'float32 -> bfloat16': where the two were stored in different dtypes, the source was cast."""
    copies: tuple[str, ...]
    """Names of further tensors of the source that equal the one that they are tied to, and are not written."""


def compare_checkpoints(source: Path, other: Path) -> Comparison:
    """Compares every tensor of a Hugging Face folder with a converted folder, or with another Hugging Face folder.

    Both ways are taken for a converted folder: what Megatron loads is compared with what the source's tensors make,
    and the tensors that would be written back with the source's. To be called where there are no process groups.

    Raises:
        ValueError: one of them is incomplete, or has a tensor too many, too few or twice.
    """
    plan = plan_model(source)
    weights = HfFolder(source, plan.released_name)
    copies = weights.check([stored.entry for stored in plan.entries], plan.hf_copies)
    compare = _stored_side(other / DIST_CKPT, plan) if (other / DIST_CKPT).is_dir() else _hf_side(other, plan)
    differing: dict[str, None] = {}
    casts: dict[str, None] = {}
    sources = [(stored, weights.tensors(stored.entry)) for stored in plan.entries]
    total = sum(tensor.nbytes for _, tensors in sources for tensor in tensors)
    progress = ByteProgress(f"comparing {other.name}", total)
    for block in read_ahead(block for stored, tensors in sources for block in compare(stored, tensors)):
        if block.source.dtype != block.other.dtype:
            casts[f"{block.source.dtype} -> {block.other.dtype}".replace("torch.", "")] = None
        if not _equal_bits(block.source.to(block.other.dtype), block.other):
            differing[block.name] = None
        progress.add(block.progress)
    progress.close()
    compared = sum(len(tensors) for _, tensors in sources)
    return Comparison(compared, total, tuple(differing), tuple(casts), copies)


@dataclass(frozen=True)
class _Block:
    """Rows of one tensor from both sides."""

    name: str
    source: Tensor
    other: Tensor
    progress: int
    """Bytes of the source that are done with it."""


_Compare = Callable[[StoredEntry, tuple[LazyTensor, ...]], Iterator[_Block]]
"""(parameter, the source's tensors) -> both sides, block by block."""


def _stored_side(dist_ckpt: Path, plan: ModelPlan) -> _Compare:
    weights = StoredWeights(dist_ckpt)
    weights.check_keys({part.key for stored in plan.entries for part in stored.parts})
    for stored in plan.entries:
        weights.check(stored)
    return partial(_with_stored, weights)


def _hf_side(folder: Path, plan: ModelPlan) -> _Compare:
    weights = HfFolder(folder, plan.released_name)
    weights.check([stored.entry for stored in plan.entries], plan.hf_copies)
    return lambda stored, tensors: _with_hf(tensors, weights.tensors(stored.entry))


def _with_stored(weights: StoredWeights, stored: StoredEntry, tensors: tuple[LazyTensor, ...]) -> Iterator[_Block]:
    names, kind = stored.entry.hf_names, stored.entry.kind
    if isinstance(kind, Vocabulary | Split | Gated):  # the rows of one tensor after those of another
        for part in stored.parts:
            for low, high in weights.row_steps(part, num_bytes=PIECE_BYTES):
                block, first = weights.rows(part, low, high), 0
                for name, tensor in zip(names, tensors, strict=True):
                    begin, end = max(low, first), min(high, first + tensor.shape[0])
                    if begin < end:
                        rows = tensor[begin - first : end - first]
                        yield _Block(name, rows, block[begin - low : end - low], rows.nbytes)
                    first += tensor.shape[0]
        return
    parameter = torch.cat([weights.rows(part, part.row, part.row + part.rows) for part in stored.parts])
    yield _Block(names[0], kind.shard(tensors, rank=0, size=1), parameter, 0)
    for name, tensor, back in zip(names, tensors, kind.merge(parameter[None]), strict=True):
        yield _Block(name, tensor[:], back, tensor.nbytes)


def _with_hf(tensors: tuple[LazyTensor, ...], others: tuple[LazyTensor, ...]) -> Iterator[_Block]:
    for tensor, other in zip(tensors, others, strict=True):
        step = max(1, PIECE_BYTES * tensor.shape[0] // tensor.nbytes)
        for low in range(0, tensor.shape[0], step):
            rows = tensor[low : low + step]
            yield _Block(tensor.name, rows, other[low : low + step], rows.nbytes)


def _equal_bits(left: Tensor, right: Tensor) -> bool:
    bits = _BITS[left.dtype.itemsize]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))
