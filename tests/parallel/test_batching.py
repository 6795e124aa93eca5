"""Packed micro-batches and the places of response tokens in them, by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Prompt, Response
from megatron_vppo.parallel.batching import BatchSplit, Packer, ResponseBatch, View, num_tokens, rows_of_rank

IMAGE = 9
WHOLE = BatchSplit(context=1, context_rank=0, sequence_ranks=1, image_ranks=1, image_rank=0)
SMALL, LARGE = (1, 2, 4), (1, 4, 4)
"""Patches of two images, merged by 2 x 2: 2 and 4 features."""
NOISE = PerturbKey(step=1, response_number=None)


def respond(prompt: Sequence[int], response: Sequence[int], *, images: Sequence[int] = (), group: int = 0) -> Response:
    """Makes a response to a prompt with these images: 0 is small, 1 is large."""
    return Response(
        prompt=Prompt(
            split="train",
            row=0,
            problem="",
            answer="",
            token_ids=tuple(prompt),
            compact_token_ids=(),
            images=tuple(ImageRef("train", image, 0) for image in images),
            grids_thw=tuple((SMALL, LARGE)[image] for image in images),
        ),
        group_id=group,
        sample=0,
        token_ids=tuple(response),
        rollout_logps=(0.0,) * len(response),
        finish_reason="stop",
        weight_version=0,
    )


class NumberedPixels:
    """Every patch of an image holds the number of the image, and ten more if the image is perturbed."""

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Tensor:
        return torch.full(((8, 16)[ref.row], 1), ref.row + (0.0 if perturb is None else 10.0))


def positions(token_ids: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Says how many images a sequence has, in place of its columns."""
    place = torch.arange(len(token_ids))
    return torch.stack([place, place, torch.full_like(place, len(grids))])


def pack(
    responses: Sequence[Response], views: Sequence[View], split: BatchSplit = WHOLE, *, with_tower: bool = True
) -> ResponseBatch:
    pixels = NumberedPixels() if with_tower else None
    return Packer(pixels, positions, IMAGE, 2, split, torch.device("cpu")).pack(responses, views)


@pytest.mark.parametrize(
    ("rank", "index", "targets", "row", "perturbed"),
    [(0, [2, 3], [21, 22], 1, False), (1, [4, 5, 6], [11, 12, 13], 0, True)],
)
def test_each_context_rank_predicts_its_own_tokens(
    rank: int, index: list[int], targets: list[int], row: int, perturbed: bool
) -> None:
    """Two sequences of eight tokens; rank 0 has 0 1 6 7 8 9 14 15 of them, rank 1 the others. 21 and 22 are predicted
    by tokens 6 and 7, the three of the second sequence by 10, 11 and 12."""
    responses = [respond([5, 6, 7], [11, 12, 13]), respond([1, 2, 3, 4, 5, 6, 7], [21, 22])]
    split = dataclasses.replace(WHOLE, context=2, context_rank=rank)
    batch = pack(responses, [View(1, None), View(0, NOISE)], split)
    assert batch.packed.token_ids_K.tolist() == [1, 2, 3, 4, 5, 6, 7, 21, 5, 6, 7, 11, 12, 0, 0, 0]
    assert batch.packed.packing.lengths == (8, 8) and batch.packed.pixels_PD is None
    tokens = batch.tokens
    assert tokens.hidden_index_N.tolist() == index and tokens.target_N.tolist() == targets
    assert tokens.row_N.tolist() == [row] * len(index) and tokens.column_N.tolist() == list(range(len(index)))
    assert tokens.perturbed_N.tolist() == [perturbed] * len(index)
    assert tokens.at == (tokens.row_N, tokens.column_N)


def test_filler_and_views_that_do_not_count_are_not_read() -> None:
    """Four tokens over two ranks of four each: four more are missing."""
    split = dataclasses.replace(WHOLE, context=2, token_alignment=4)
    responses = [respond([5, 6, 7], [11, 12])]
    batch = pack(responses, [View(0, None)], split)
    assert batch.packed.token_ids_K.tolist() == [5, 6, 7, 11, 0, 0, 0, 0]
    assert batch.packed.positions_3K.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2 + [[0, 0, 0, 0, 0, 1, 2, 3]]
    assert batch.packed.packing.lengths == (4, 4)
    assert batch.tokens.target_N.tolist() == [12] and batch.tokens.hidden_index_N.tolist() == [1]
    assert not len(pack(responses, [View(0, None, counted=False)], split).tokens.target_N)


def test_sequence_parallel_ranks_pad_the_last_sequence() -> None:
    split = dataclasses.replace(WHOLE, sequence_ranks=4)
    batch = pack([respond([5, 6, 7], [11, 12]), respond([5, 6], [11])], [View(0, None), View(1, None)], split)
    assert batch.packed.token_ids_K.tolist() == [5, 6, 7, 11, 5, 6, 0, 0]
    assert batch.tokens.hidden_index_N.tolist() == [2, 3, 5] and batch.tokens.row_N.tolist() == [0, 0, 1]


def test_an_image_goes_through_the_tower_once_per_perturbation() -> None:
    """Rows 0 and 1 share the large image, the first image of row 1; the perturbed view of row 0 has its own."""
    many, few = [IMAGE] * 4, [IMAGE] * 2
    responses = [respond([5, *many], [11], images=[1]), respond([*many, 6, *few], [12], images=[1, 0])]
    views = [View(0, None), View(1, None), View(0, NOISE)]
    batch = pack(responses, views).packed
    assert batch.grids_thw == (LARGE, SMALL, LARGE) and batch.images_of_ranks == ((0, 1, 2),)
    assert batch.image_token_index_I.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 14, 15, 16]
    assert batch.image_feature_index_I.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.pixels_PD is not None and batch.pixels_PD[:, 0].tolist() == [1.0] * 16 + [0.0] * 8 + [11.0] * 16
    assert batch.positions_3K[2].tolist() == [1] * 5 + [2] * 7 + [1] * 5


@pytest.mark.parametrize(("image_rank", "pixels"), [(0, [1.0] * 16), (1, [0.0] * 8), (2, [])])
def test_ranks_share_out_the_images(image_rank: int, pixels: list[float]) -> None:
    split = dataclasses.replace(WHOLE, image_ranks=3, image_rank=image_rank)
    responses = [respond([IMAGE] * 2 + [5] + [IMAGE] * 4, [11], images=[0, 1])]
    batch = pack(responses, [View(0, None)], split).packed
    assert batch.images_of_ranks == ((1,), (0,), ())
    assert batch.pixels_PD is not None and batch.pixels_PD.flatten().tolist() == pixels
    assert batch.pixels_PD.shape == ((len(pixels), 1) if pixels else (0, 0))
    assert pack(responses, [View(0, None)], split, with_tower=False).packed.pixels_PD is None


@pytest.mark.parametrize(("data", "rows"), [(1, [(0, 2, 1, 3, 4, 5)]), (2, [(0, 2, 5), (1, 3, 4)])])
def test_a_rank_gets_whole_groups(data: int, rows: list[tuple[int, ...]]) -> None:
    """Groups of 9, 8, 7 and 1 tokens to read: with the first goes the last, as in test_balancing."""
    lengths, groups = (5, 8, 4, 3, 4, 1), (0, 1, 0, 2, 2, 3)
    responses = [respond([1] * n, [2], group=group) for n, group in zip(lengths, groups, strict=True)]
    assert [num_tokens(response) for response in responses] == list(lengths)
    assert [rows_of_rank(responses, data_rank=rank, data=data) for rank in range(data)] == rows


def test_a_rank_without_a_group() -> None:
    assert [rows_of_rank([respond([1], [2])], data_rank=rank, data=2) for rank in (0, 1)] == [(0,), ()]
