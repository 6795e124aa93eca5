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
from megatron_vppo.models.packed import PackedBatch

PatchSource = Callable[[ImageRef, PerturbKey | None], Tensor]
"""(image, how it is perturbed or None) -> float32 [patches, values per patch]."""

PositionFn = Callable[[Sequence[int], Sequence[tuple[int, int, int]]], Tensor]
"""(token ids, image grids) -> int64 [3, tokens] rotary positions."""


@dataclass(frozen=True)
class View:
    """One look at one response: its row in the mini-batch, and how its images are perturbed (None: as they are)."""

    row: int
    perturb: PerturbKey | None


@dataclass(frozen=True)
class ResponseBatch:
    """One packed micro-batch and where its response tokens are."""

    packed: PackedBatch
    hidden_index_N: Tensor
    """int64; the place in the packed tokens whose hidden state predicts each response token."""
    target_N: Tensor
    """int64; the response tokens."""
    row_N: Tensor
    column_N: Tensor
    """int64; row and column of each response token in [B, T] tensors."""
    perturbed_N: Tensor
    """bool; whether the token is read in a view with perturbed images."""


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
    device: torch.device,
) -> ResponseBatch:
    """Packs one micro-batch. The last response token is left out of the input: nothing is predicted from it.

    Args:
        patches: where pixels come from; None on pipeline stages without the vision tower.
    """
    token_ids: list[int] = []
    lengths: list[int] = []
    position_blocks: list[Tensor] = []
    hidden_index: list[Tensor] = []
    targets: list[int] = []
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    perturbed: list[Tensor] = []
    pictures = _Pictures(merge_size)
    feature_index: list[Tensor] = []
    for view in views:
        response = responses[view.row]
        prompt, answer = response.prompt, response.token_ids
        sequence = [*prompt.token_ids, *answer[:-1]]
        start = len(token_ids) + len(prompt.token_ids) - 1
        hidden_index.append(torch.arange(start, start + len(answer)))
        rows.append(torch.full((len(answer),), view.row))
        columns.append(torch.arange(len(answer)))
        perturbed.append(torch.full((len(answer),), view.perturb is not None))
        targets.extend(answer)
        position_blocks.append(positions(sequence, prompt.grids_thw))
        feature_index.extend(
            pictures.features(ref, view.perturb, grid)
            for ref, grid in zip(prompt.images, prompt.grids_thw, strict=True)
        )
        token_ids.extend(sequence)
        lengths.append(len(sequence))
    token_ids_T = torch.tensor(token_ids, dtype=torch.int64)
    return ResponseBatch(
        packed=PackedBatch(
            token_ids_T=token_ids_T.to(device),
            positions_3T=torch.cat(position_blocks, dim=1).to(device),
            lengths=tuple(lengths),
            image_token_index_I=(token_ids_T == image_token_id).nonzero()[:, 0].to(device),
            image_feature_index_I=_cat(feature_index).to(device),
            pixels_PD=pictures.pixels(patches).to(device) if patches is not None and pictures.grids else None,
            grids_thw=tuple(pictures.grids),
        ),
        hidden_index_N=torch.cat(hidden_index).to(device),
        target_N=torch.tensor(targets, dtype=torch.int64, device=device),
        row_N=torch.cat(rows).to(device),
        column_N=torch.cat(columns).to(device),
        perturbed_N=torch.cat(perturbed).to(device),
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

    def pixels(self, patches: PatchSource) -> Tensor:
        return torch.cat([patches(ref, perturb) for ref, perturb in self._first_feature])


def _cat(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64)
