"""Responses -> packed micro-batches, and per-token results back into response-aligned tensors.

Shape suffix legend: B = responses of the whole mini-batch, T = response tokens (right-padded), N = response tokens of
one micro-batch, flat, in row order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, Response
from megatron_vppo.data.packing import assign_to_ranks
from megatron_vppo.data.perturb import PerturbKey
from megatron_vppo.models.context import own_tokens, padded_lengths
from megatron_vppo.models.dealing import deal_pictures
from megatron_vppo.models.packed import PackedBatch

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
    token_ids: list[int] = []
    position_blocks: list[Tensor] = []
    hidden_index: list[Tensor] = []
    targets: list[Tensor] = []
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    perturbed: list[Tensor] = []
    pictures = _Pictures(merge_size)
    feature_index: list[Tensor] = []
    padded = padded_lengths(
        [num_tokens(responses[view.row]) for view in views], tensor=split.sequence_ranks, context=split.context
    )
    for view, length in zip(views, padded, strict=True):
        response = responses[view.row]
        prompt, answer = response.prompt, response.token_ids
        # Nothing that counts looks ahead at the padding behind it.
        padding = [_PADDING_TOKEN] * (length - num_tokens(response))
        sequence = [*prompt.token_ids, *answer[:-1], *padding]
        start = len(token_ids) + len(prompt.token_ids) - 1
        counted = len(answer) if view.counted else 0
        hidden_index.append(torch.arange(start, start + counted))
        rows.append(torch.full((counted,), view.row))
        columns.append(torch.arange(counted))
        perturbed.append(torch.full((counted,), view.perturb is not None))
        targets.append(torch.tensor(answer[:counted], dtype=torch.int64))
        position_blocks.append(positions(sequence, prompt.grids_thw))
        feature_index.extend(
            pictures.features(ref, view.perturb, grid)
            for ref, grid in zip(prompt.images, prompt.grids_thw, strict=True)
        )
        token_ids.extend(sequence)
    token_ids_T = torch.tensor(token_ids, dtype=torch.int64)
    own_T = own_tokens(tuple(padded), rank=split.context_rank, size=split.context)
    place_K = torch.full_like(token_ids_T, -1)
    place_K[own_T] = torch.arange(len(own_T))
    hidden_index_N = place_K[torch.cat(hidden_index)]
    here_N = hidden_index_N >= 0
    return ResponseBatch(
        packed=PackedBatch(
            token_ids_T=token_ids_T.to(device),
            positions_3T=torch.cat(position_blocks, dim=1).to(device),
            lengths=tuple(padded),
            image_token_index_I=(token_ids_T == image_token_id).nonzero()[:, 0].to(device),
            image_feature_index_I=_cat(feature_index).to(device),
            pixels_PD=pictures.pixels(patches, split).to(device) if patches is not None and pictures.grids else None,
            grids_thw=tuple(pictures.grids),
        ),
        hidden_index_N=hidden_index_N[here_N].to(device),
        target_N=torch.cat(targets)[here_N].to(device),
        row_N=torch.cat(rows)[here_N].to(device),
        column_N=torch.cat(columns)[here_N].to(device),
        perturbed_N=torch.cat(perturbed)[here_N].to(device),
    )


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
        mine = deal_pictures(tuple(self.grids), ranks=split.picture_ranks)[split.picture_rank]
        pictures = list(self._first_feature)
        blocks = [patches(*pictures[number]) for number in mine]
        return torch.cat(blocks) if blocks else torch.zeros(0, patches(*pictures[0]).shape[1])


def _cat(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64)
