"""Packed micro-batches made of responses, and the way from their hidden states back to [B, T] tensors.

Shape suffix legend: B = responses of the whole mini-batch; T = response tokens, right-padded; N = response tokens of a
micro-batch that this context-parallel rank predicts, flat; L = tokens of one packed sequence; K = all packed tokens of
a micro-batch; C = tokens of this context-parallel rank; I = image tokens among K; P = patches; D = values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Response
from megatron_vppo.models.family import PositionFn
from megatron_vppo.models.layers.context_parallel import padded_packing, tokens_of_rank
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.vision.image_parallel import assign_images
from megatron_vppo.parallel.balancing import assign_to_ranks

_PADDING_TOKEN = 0


class Pixels(Protocol):
    """The source of pixels. `Packer.pack` asks it for an image just before the image's micro-batch runs."""

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Tensor:
        """Returns the patches of an image, float32 [P, D]; perturbed if there is a key."""
        ...


@dataclass(frozen=True)
class View:
    """One look at one response: with its images as they are, or perturbed.

    Example: View(row=3, perturb=PerturbKey(step=7, response_number=65536)) is the perturbed view of sample 0 of group
    1, which is row 3 of the mini-batch.
    """

    row: int
    """The response's row in the mini-batch."""
    perturb: PerturbKey | None
    """The perturbation of its images. None: they are shown as they are."""
    counted: bool = True
    """False for a stand-in, from which no response token is read: the filler of a packing, or the view that a rank
    without micro-batches of its own runs to take part in the collectives of the others."""


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens that this context-parallel rank predicts in a micro-batch, and their places."""

    hidden_index_N: Tensor
    """int64; the index among this rank's packed tokens (C) of the hidden state that predicts each token."""
    target_N: Tensor
    """int64; the tokens."""
    row_N: Tensor
    column_N: Tensor
    """int64; the row and column of each token in [B, T] tensors."""
    perturbed_N: Tensor
    """bool; True if the token belongs to a view with perturbed images."""

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """The index of these tokens into [B, T] tensors."""
        return self.row_N, self.column_N

    def select(self, which: Tensor | slice) -> ResponseTokens:
        """Selects some of the tokens, by indices, mask or slice."""
        return ResponseTokens(
            self.hidden_index_N[which],
            self.target_N[which],
            self.row_N[which],
            self.column_N[which],
            self.perturbed_N[which],
        )

    def to(self, device: torch.device) -> ResponseTokens:
        return ResponseTokens(
            self.hidden_index_N.to(device),
            self.target_N.to(device),
            self.row_N.to(device),
            self.column_N.to(device),
            self.perturbed_N.to(device),
        )


@dataclass(frozen=True)
class ResponseBatch:
    """One packed micro-batch: the input of the model, and the tokens whose log-probs its output gives."""

    packed: PackedBatch
    tokens: ResponseTokens


@dataclass(frozen=True)
class BatchSplit:
    """The numbers of ranks that work on one micro-batch together, and this rank's place among them."""

    context: int
    """The number of context-parallel ranks."""
    context_rank: int
    sequence_ranks: int
    """The number of tensor-parallel ranks that share out the tokens between layers; 1 without sequence parallelism."""
    image_ranks: int
    """The number of ranks that share out the images, each taking whole ones through the vision tower."""
    image_rank: int
    token_alignment: int = 1
    """The tokens that each rank holds are padded to a multiple of this; FP8 needs it."""


def rows_of_rank(responses: Sequence[Response], *, data_rank: int, data: int) -> tuple[int, ...]:
    """Returns the rows of a data-parallel rank: whole groups, balanced by tokens.

    A group shares its prompt's images, so each image is needed on one data-parallel rank only. There are no rows if
    there are fewer groups than ranks.
    """
    rows_of_group: dict[int, list[int]] = {}
    for row, response in enumerate(responses):
        rows_of_group.setdefault(response.group_id, []).append(row)
    groups = list(rows_of_group.values())
    lengths = [sum(num_tokens(responses[row]) for row in rows) for rows in groups]
    mine = sorted(assign_to_ranks(lengths, num_ranks=data)[data_rank])
    return tuple(row for group in mine for row in groups[group])


def num_tokens(response: Response) -> int:
    """Counts the tokens that the model reads to score a response: all but the last, which predicts nothing."""
    return len(response.prompt.token_ids) + len(response.token_ids) - 1


@dataclass(frozen=True)
class Packer:
    """Packs views of responses into micro-batches, for this rank."""

    pixels: Pixels | None
    """None on pipeline stages without the vision tower."""
    positions: PositionFn
    """The family's rotary positions of a sequence, from its token ids and image grids."""
    image_token_id: int
    merge_size: int
    """Patches along one side of a merged vision feature."""
    split: BatchSplit
    device: torch.device

    def pack(self, responses: Sequence[Response], views: Sequence[View]) -> ResponseBatch:
        """Packs one micro-batch; the tokens are in the order of the views."""
        images = _Images(self.merge_size)
        packing = padded_packing(
            [num_tokens(responses[view.row]) for view in views],
            tensor=self.split.sequence_ranks,
            context=self.split.context,
            alignment=self.split.token_alignment,
        )
        sequences = [
            _sequence(responses[view.row], view, length=length, positions=self.positions, images=images)
            for view, length in zip(views, packing.lengths[: len(views)], strict=True)
        ]
        if packing.ends_in_filler:
            sequences.append(_filler(packing.lengths[-1]))
        images_of_ranks = assign_images(tuple(images.grids), ranks=self.split.image_ranks)
        token_ids_K = torch.tensor([token for sequence in sequences for token in sequence.token_ids], dtype=torch.int64)
        return ResponseBatch(
            packed=PackedBatch(
                token_ids_K=token_ids_K.to(self.device),
                positions_3K=torch.cat([sequence.positions_3L for sequence in sequences], dim=1).to(self.device),
                packing=packing,
                image_token_index_I=(token_ids_K == self.image_token_id).nonzero()[:, 0].to(self.device),
                image_feature_index_I=_concatenated(
                    [index for sequence in sequences for index in sequence.feature_indices]
                ).to(self.device),
                pixels_PD=self._pixels_of(images, images_of_ranks[self.split.image_rank]),
                grids_thw=tuple(images.grids),
                images_of_ranks=images_of_ranks,
            ),
            tokens=_response_tokens(sequences, packing, self.split).to(self.device),
        )

    def _pixels_of(self, images: _Images, own_images: Sequence[int]) -> Tensor | None:
        """Returns the patches of this rank's images, given by their numbers; [0, 0] if it has none."""
        if self.pixels is None or not images.grids:
            return None
        patches = [self.pixels.patches(*images.keys[number]) for number in own_images]
        return (torch.cat(patches) if patches else torch.zeros(0, 0)).to(self.device)


@dataclass(frozen=True)
class _Sequence:
    """One view as the model reads it."""

    view: View
    token_ids: tuple[int, ...]
    positions_3L: Tensor
    feature_indices: tuple[Tensor, ...]
    """The int64 indices of each image's merged features among those of all images of the micro-batch."""
    response: tuple[int, ...]
    """The response tokens to read; empty if the view is not counted."""
    response_start: int
    """The position within the sequence of the hidden state that predicts the first response token."""


def _sequence(response: Response, view: View, *, length: int, positions: PositionFn, images: _Images) -> _Sequence:
    """Lays out a view, padded to `length`. The padding comes last, and attention is causal: no real token sees it."""
    prompt, response_ids = response.prompt, tuple(response.token_ids)
    padding = (_PADDING_TOKEN,) * (length - num_tokens(response))
    token_ids = (*prompt.token_ids, *response_ids[:-1], *padding)
    return _Sequence(
        view=view,
        token_ids=token_ids,
        positions_3L=positions(token_ids, prompt.grids_thw),
        feature_indices=tuple(
            images.feature_index(ref, view.perturb, grid)
            for ref, grid in zip(prompt.images, prompt.grids_thw, strict=True)
        ),
        response=response_ids if view.counted else (),
        response_start=len(prompt.token_ids) - 1,
    )


def _filler(length: int) -> _Sequence:
    """Makes a sequence of padding alone, for tokens that no sequence of its own can absorb (see padded_packing)."""
    return _Sequence(
        view=View(0, None, counted=False),
        token_ids=(_PADDING_TOKEN,) * length,
        positions_3L=torch.arange(length).expand(3, -1),
        feature_indices=(),
        response=(),
        response_start=0,
    )


def _response_tokens(sequences: Sequence[_Sequence], packing: Packing, split: BatchSplit) -> ResponseTokens:
    """Finds the response tokens whose predicting hidden states this context-parallel rank holds."""
    # A token is predicted by the hidden state before it. Say there are two sequences of eight tokens. The second has
    # the prompt p p p and the response a b c, of which c is not read. Two context-parallel ranks share the tokens: each
    # sequence is cut into four chunks, of which rank 0 takes the outer two and rank 1 the inner two.
    #
    #     sequence          p  p  p  a  b  .  .  .     . is padding
    #     predicts                a  b  c
    #     index in K        8  9 10 11 12 13 14 15     start 8; the response starts at 8 + 2
    #     held by rank      0  0  1  1  1  1  0  0
    #     index in C of 1   -  -  4  5  6  7  -  -     0 to 3 are of the first sequence
    #
    # Rank 1 predicts all three: hidden_index_N = 4 5 6, target_N = a b c, column_N = 0 1 2. Rank 0 predicts none.
    index, targets, rows, columns, perturbed = [], [], [], [], []
    for sequence, start in zip(sequences, packing.starts, strict=True):
        first, count = start + sequence.response_start, len(sequence.response)
        index.append(torch.arange(first, first + count))
        targets.append(torch.tensor(sequence.response, dtype=torch.int64))
        rows.append(torch.full((count,), sequence.view.row))
        columns.append(torch.arange(count))
        perturbed.append(torch.full((count,), sequence.view.perturb is not None))
    own_C = tokens_of_rank(packing, rank=split.context_rank, size=split.context)
    index_in_C_K = torch.full((packing.num_tokens,), -1)
    index_in_C_K[own_C] = torch.arange(len(own_C))
    everywhere = ResponseTokens(
        hidden_index_N=index_in_C_K[torch.cat(index)],
        target_N=torch.cat(targets),
        row_N=torch.cat(rows),
        column_N=torch.cat(columns),
        perturbed_N=torch.cat(perturbed),
    )
    return everywhere.select(everywhere.hidden_index_N >= 0)


class _Images:
    """The distinct images of a micro-batch. The same image under the same perturbation goes through the tower once."""

    def __init__(self, merge_size: int) -> None:
        self._merge_area = merge_size * merge_size
        self._first_feature: dict[tuple[ImageRef, PerturbKey | None], int] = {}
        self._num_features = 0
        self.grids: list[tuple[int, int, int]] = []

    @property
    def keys(self) -> list[tuple[ImageRef, PerturbKey | None]]:
        """Image and perturbation, in the order of `grids`."""
        return list(self._first_feature)

    def feature_index(self, ref: ImageRef, perturb: PerturbKey | None, grid: tuple[int, int, int]) -> Tensor:
        """Returns the indices of the image's merged features among those of all images, and adds it if it is new."""
        count = grid[0] * grid[1] * grid[2] // self._merge_area
        key = (ref, perturb)
        if key not in self._first_feature:
            self._first_feature[key] = self._num_features
            self._num_features += count
            self.grids.append(grid)
        first = self._first_feature[key]
        return torch.arange(first, first + count)


def _concatenated(indices: list[Tensor]) -> Tensor:
    return torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)
