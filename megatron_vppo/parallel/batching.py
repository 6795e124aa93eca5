"""Responses -> packed micro-batches, and per-token results back into response-aligned tensors.

Shape suffix legend: B = responses of the whole mini-batch, T = response tokens (right-padded), N = response tokens of
one micro-batch, flat, in row order, L = tokens of one packed sequence, K = tokens of all of them, C = those of this
context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Response
from megatron_vppo.models.layers.context_parallel import padded_packing, tokens_of_rank
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.vision.image_parallel import assign_images
from megatron_vppo.parallel.balancing import assign_to_ranks

_PADDING_TOKEN = 0

PatchSource = Callable[[ImageRef, PerturbKey | None], Tensor]
"""(image, how it is perturbed or None) -> float32 [patches, values per patch]."""

PositionFn = Callable[[Sequence[int], Sequence[tuple[int, int, int]]], Tensor]
"""(token ids, image grids) -> int64 [3, tokens] rotary positions."""


@dataclass(frozen=True)
class View:
    """One look at one response."""

    row: int
    """In the mini-batch."""
    perturb: PerturbKey | None
    """How its images are perturbed; None: as they are."""
    counted: bool = True
    """False: it is only run, so that this rank takes part in the others' schedule; it has no response tokens."""


@dataclass(frozen=True)
class ResponseBatch:
    """One packed micro-batch and where those of its response tokens are that this context-parallel rank predicts."""

    packed: PackedBatch
    hidden_index_N: Tensor
    """int64; the place in this rank's packed tokens whose hidden state predicts each response token."""
    target_N: Tensor
    """int64; the response tokens."""
    row_N: Tensor
    column_N: Tensor
    """int64; row and column of each response token in [B, T] tensors."""
    perturbed_N: Tensor
    """bool; whether the token is read in a view with perturbed images."""


@dataclass(frozen=True)
class BatchSplit:
    """How many ranks share a micro-batch, and which one this is."""

    context: int
    context_rank: int
    sequence_ranks: int
    """That hold shares of a context-parallel rank's tokens (sequence parallelism; 1: none)."""
    picture_ranks: int
    picture_rank: int
    """Among which pictures are dealt."""
    token_alignment: int = 1
    """What the tokens that each rank holds must be a multiple of; FP8 needs it."""


def rows_of_rank(responses: Sequence[Response], *, data_rank: int, data: int) -> tuple[int, ...]:
    """Rows that a data-parallel rank works on: whole groups, balanced by tokens, so that a picture is seen by one rank.

    May be empty where there are fewer groups than ranks.
    """
    rows_of_group: dict[int, list[int]] = {}
    for row, response in enumerate(responses):
        rows_of_group.setdefault(response.group_id, []).append(row)
    groups = list(rows_of_group.values())
    lengths = [sum(num_tokens(responses[row]) for row in rows) for rows in groups]
    mine = sorted(assign_to_ranks(lengths, num_ranks=data)[data_rank])
    return tuple(row for group in mine for row in groups[group])


def num_tokens(response: Response) -> int:
    """Tokens that the model reads to score a response."""
    return len(response.prompt.token_ids) + len(response.token_ids) - 1


def pack_views(
    responses: Sequence[Response],
    views: Sequence[View],
    *,
    patches: PatchSource | None,
    positions: PositionFn,
    image_token_id: int,
    merge_size: int,
    split: BatchSplit,
    device: torch.device,
) -> ResponseBatch:
    """Packs one micro-batch. The last response token is left out of the input: nothing is predicted from it.

    Args:
        patches: where pixels come from; None on pipeline stages without the vision tower.
        split: what the batch must divide over.
    """
    pictures = _Pictures(merge_size)
    packing = padded_packing(
        [num_tokens(responses[view.row]) for view in views],
        tensor=split.sequence_ranks,
        context=split.context,
        alignment=split.token_alignment,
    )
    sequences = [
        _sequence(responses[view.row], view, length=length, positions=positions, pictures=pictures)
        for view, length in zip(views, packing.lengths[: len(views)], strict=True)
    ]
    if packing.ends_in_filler:
        sequences.append(_filler(packing.lengths[-1]))
    token_ids_K = torch.tensor([token for sequence in sequences for token in sequence.token_ids], dtype=torch.int64)
    return ResponseBatch(
        packed=PackedBatch(
            token_ids_K=token_ids_K.to(device),
            positions_3K=torch.cat([sequence.positions_3L for sequence in sequences], dim=1).to(device),
            packing=packing,
            image_token_index_I=(token_ids_K == image_token_id).nonzero()[:, 0].to(device),
            image_feature_index_I=_cat([features for s in sequences for features in s.features]).to(device),
            pixels_PD=pictures.pixels(patches, split).to(device) if patches is not None and pictures.grids else None,
            grids_thw=tuple(pictures.grids),
        ),
        **{name: index.to(device) for name, index in _answers(sequences, packing, split).items()},
    )


@dataclass(frozen=True)
class _Sequence:
    """One view, as the model reads it and as its answer is found again."""

    view: View
    token_ids: tuple[int, ...]
    positions_3L: Tensor
    features: tuple[Tensor, ...]
    """Per image, the indices of its features."""
    answer: tuple[int, ...]
    """Empty where the view is not counted."""
    answer_start: int
    """Where the hidden state is that predicts its first token."""


def _sequence(response: Response, view: View, *, length: int, positions: PositionFn, pictures: _Pictures) -> _Sequence:
    """Padded to `length`; nothing that counts looks ahead at the padding."""
    prompt, answer = response.prompt, tuple(response.token_ids)
    padding = (_PADDING_TOKEN,) * (length - num_tokens(response))
    token_ids = (*prompt.token_ids, *answer[:-1], *padding)
    return _Sequence(
        view=view,
        token_ids=token_ids,
        positions_3L=positions(token_ids, prompt.grids_thw),
        features=tuple(
            pictures.features(ref, view.perturb, grid)
            for ref, grid in zip(prompt.images, prompt.grids_thw, strict=True)
        ),
        answer=answer if view.counted else (),
        answer_start=len(prompt.token_ids) - 1,
    )


def _filler(length: int) -> _Sequence:
    """A sequence of no view."""
    return _Sequence(
        view=View(0, None, counted=False),
        token_ids=(_PADDING_TOKEN,) * length,
        positions_3L=torch.arange(length).expand(3, -1),
        features=(),
        answer=(),
        answer_start=0,
    )


def _answers(sequences: Sequence[_Sequence], packing: Packing, split: BatchSplit) -> dict[str, Tensor]:
    """The fields of ResponseBatch that say where response tokens are, for this rank's share of the tokens."""
    index, targets, rows, columns, perturbed = [], [], [], [], []
    for sequence, start in zip(sequences, packing.starts, strict=True):
        first, count = start + sequence.answer_start, len(sequence.answer)
        index.append(torch.arange(first, first + count))
        targets.append(torch.tensor(sequence.answer, dtype=torch.int64))
        rows.append(torch.full((count,), sequence.view.row))
        columns.append(torch.arange(count))
        perturbed.append(torch.full((count,), sequence.view.perturb is not None))
    own_C = tokens_of_rank(packing, rank=split.context_rank, size=split.context)
    place_K = torch.full((packing.num_tokens,), -1)
    place_K[own_C] = torch.arange(len(own_C))
    hidden_index_N = place_K[torch.cat(index)]
    here_N = hidden_index_N >= 0
    return {
        "hidden_index_N": hidden_index_N[here_N],
        "target_N": torch.cat(targets)[here_N],
        "row_N": torch.cat(rows)[here_N],
        "column_N": torch.cat(columns)[here_N],
        "perturbed_N": torch.cat(perturbed)[here_N],
    }


class _Pictures:
    """The distinct pictures of a micro-batch: the same image under the same perturbation goes through vision once."""

    def __init__(self, merge_size: int) -> None:
        self._merge_area = merge_size * merge_size
        self._first_feature: dict[tuple[ImageRef, PerturbKey | None], int] = {}
        self._num_features = 0
        self.grids: list[tuple[int, int, int]] = []

    def features(self, ref: ImageRef, perturb: PerturbKey | None, grid: tuple[int, int, int]) -> Tensor:
        """Indices of the picture's merged features among those of all pictures."""
        count = grid[0] * grid[1] * grid[2] // self._merge_area
        key = (ref, perturb)
        if key not in self._first_feature:
            self._first_feature[key] = self._num_features
            self._num_features += count
            self.grids.append(grid)
        first = self._first_feature[key]
        return torch.arange(first, first + count)

    def pixels(self, patches: PatchSource, split: BatchSplit) -> Tensor:
        """Patches of the pictures that are dealt to this rank; none of them where there are fewer than ranks."""
        mine = assign_images(tuple(self.grids), ranks=split.picture_ranks)[split.picture_rank]
        pictures = list(self._first_feature)
        blocks = [patches(*pictures[number]) for number in mine]
        return torch.cat(blocks) if blocks else torch.zeros(0, 0)


def _cat(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64)
