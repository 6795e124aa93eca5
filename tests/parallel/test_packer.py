"""Packed micro-batches and the places of response tokens in them, by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.patches import Patches, PatchValues
from megatron_vppo.algorithm.types import ImageRef, PerturbKey, Response
from megatron_vppo.models.layers.packing import Packing
from megatron_vppo.models.vision.tower_run import TowerRun
from megatron_vppo.parallel.batching import BatchSplit, ResponseBatch, View
from megatron_vppo.parallel.packer import Packer
from tests.parallel.responses import LARGE, SMALL, respond

IMAGE = 9
WHOLE = BatchSplit(context=1, context_rank=0, sequence_ranks=1, image_ranks=1, image_rank=0)
NOISE = PerturbKey(step=1, draw=None)


class NumberedPixels:
    """Every patch of an image is one byte, with the number of the image. A perturbation hides the last patch."""

    values = PatchValues(torch.arange(256.0)[None], frames=1)

    def __init__(self) -> None:
        self._images = [torch.full((patches, 1), 1 + row, dtype=torch.uint8) for row, patches in enumerate((8, 16))]

    def patches(self, ref: ImageRef, perturb: PerturbKey | None) -> Patches:
        image = self._images[ref.row]
        return Patches(image, None if perturb is None else torch.arange(len(image)) == len(image) - 1)


def positions(token_ids: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Says how many images a sequence has, in place of its columns."""
    place = torch.arange(len(token_ids))
    return torch.stack([place, place, torch.full_like(place, len(grids))])


def pack(
    responses: Sequence[Response],
    views: Sequence[View],
    split: BatchSplit = WHOLE,
    *,
    with_tower: bool = True,
    shares: bool = False,
) -> ResponseBatch:
    pixels = NumberedPixels() if with_tower else None
    packer = Packer(pixels, positions, IMAGE, 2, split, shares_prompts=shares)
    return packer.pack(responses, views)


def shown(batch: ResponseBatch) -> list[float]:
    """The value of each patch that the tower of this rank reads."""
    return [] if batch.patches is None else batch.patches.pixels(NumberedPixels.values).flatten().tolist()


def places(batch: ResponseBatch) -> tuple[list[int], list[int]]:
    """The rows and columns of the response tokens."""
    assert batch.tokens.at is not None
    rows, columns = batch.tokens.at
    return rows.tolist(), columns.tolist()


@pytest.mark.parametrize(
    ("rank", "index", "targets", "row"), [(0, [2, 3], [21, 22], 1), (1, [4, 5, 6], [11, 12, 13], 0)]
)
def test_each_context_rank_predicts_its_own_tokens(rank: int, index: list[int], targets: list[int], row: int) -> None:
    """Two sequences of eight tokens; rank 0 has 0 1 6 7 8 9 14 15 of them, rank 1 the others. 21 and 22 are predicted
    by tokens 6 and 7, the three of the second sequence by 10, 11 and 12."""
    responses = [respond([5, 6, 7], [11, 12, 13]), respond([1, 2, 3, 4, 5, 6, 7], [21, 22])]
    split = dataclasses.replace(WHOLE, context=2, context_rank=rank)
    batch = pack(responses, [View(1, None), View(0, None)], split)
    assert batch.packed.token_ids_K.tolist() == [1, 2, 3, 4, 5, 6, 7, 21, 5, 6, 7, 11, 12, 0, 0, 0]
    assert batch.packed.packing.lengths == (8, 8) and batch.patches is None
    tokens = batch.tokens
    assert tokens.hidden_index_N.tolist() == index and tokens.target_N.tolist() == targets
    assert places(batch) == ([row] * len(index), list(range(len(index))))
    assert tokens.num_perturbed == 0


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
    assert batch.tokens.hidden_index_N.tolist() == [2, 3, 5] and places(batch)[0] == [0, 0, 1]


def test_an_image_goes_through_the_tower_once_per_perturbation() -> None:
    """Rows 0 and 1 share the large image, the first image of row 1; the perturbed view of row 0 has its own."""
    many, few = [IMAGE] * 4, [IMAGE] * 2
    responses = [respond([5, *many], [11], images=[1]), respond([*many, 6, *few], [12], images=[1, 0])]
    views = [View(1, None), View(0, None), View(0, NOISE)]
    packed = pack(responses, views)
    batch = packed.packed
    assert batch.runs == (TowerRun((LARGE, SMALL, LARGE), ((0, 1, 2),)),)
    assert batch.image_token_index_I.tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16]
    assert batch.image_feature_index_I.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9]
    assert packed.patches is not None and packed.patches.shown == (0, 1, 0), "its bytes are sent once"
    assert packed.patches.hidden_P is not None and packed.patches.hidden_P.tolist() == [False] * 39 + [True]
    assert shown(packed) == [2.0] * 16 + [1.0] * 8 + [2.0] * 15 + [0.0]
    assert batch.positions_3K[2].tolist() == [2] * 7 + [1] * 10


@pytest.mark.parametrize(("image_rank", "pixels"), [(0, [2.0] * 16), (1, [1.0] * 8), (2, [])])
def test_ranks_share_out_the_images(image_rank: int, pixels: list[float]) -> None:
    split = dataclasses.replace(WHOLE, image_ranks=3, image_rank=image_rank)
    responses = [respond([IMAGE] * 2 + [5] + [IMAGE] * 4, [11], images=[0, 1])]
    batch = pack(responses, [View(0, None)], split)
    assert batch.packed.runs[0].images_of_ranks == ((1,), (0,), ()) and shown(batch) == pixels
    assert batch.patches is None or batch.patches.hidden_P is None
    assert pack(responses, [View(0, None)], split, with_tower=False).patches is None


def test_micro_batches_are_padded_to_few_numbers_of_tokens() -> None:
    """Thirteen tokens of a limit of sixteen become fourteen, and with a multiple of four for each rank sixteen."""
    responses = [respond([5, 6, 7, 8, 5, 6], [11, 12]), respond([5] * 5, [11, 12])]
    views = [View(0, None), View(1, None)]
    for alignment, tokens in ((1, 14), (4, 16)):
        split = dataclasses.replace(WHOLE, token_alignment=alignment)
        batch = Packer(None, positions, IMAGE, 2, split).pack(responses, views, limit=16)
        assert batch.packed.packing.lengths == (7, tokens - 7)
        assert batch.packed.token_ids_K.tolist() == [5, 6, 7, 8, 5, 6, 11, 5, 5, 5, 5, 5, 11] + [0] * (tokens - 13)
        assert batch.tokens.hidden_index_N.tolist() == [5, 6, 11, 12]
    context = dataclasses.replace(WHOLE, context=2)
    filled = Packer(None, positions, IMAGE, 2, context).pack(responses, views, limit=20).packed.packing
    assert filled == Packing((8, 8, 4), ends_in_filler=True), "16 tokens become 17 of 20, and then a multiple of 4"


def test_views_of_a_prompt_share_it() -> None:
    """The prompt i i 5 with three responses, and 6 7 with one that nobody shares it with."""
    responses = [
        respond([IMAGE, IMAGE, 5], [11, 12, 13], images=[0]),
        respond([6, 7], [21, 22], group=1),
        respond([IMAGE, IMAGE, 5], [31], images=[0]),
        respond([IMAGE, IMAGE, 5], [41, 42], images=[0]),
    ]
    batch = pack(responses, [View(row, None) for row in range(4)], dataclasses.replace(WHOLE, token_alignment=5),
                 shares=True)  # fmt: skip
    packed, tokens = batch.packed, batch.tokens
    assert packed.token_ids_K.tolist() == [IMAGE, IMAGE, 5, 6, 7, 21, 11, 12, 41, 0]
    assert packed.packing == Packing((3, 3, 2, 2), prefixes=(0, 0)), (
        "a response of one token is predicted by the prompt"
    )
    assert packed.positions_3K[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4], "each goes on from the prompt"
    assert packed.positions_3K[2].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1], "images of the prompt are known"
    assert packed.image_token_index_I.tolist() == [0, 1] and packed.image_feature_index_I.tolist() == [0, 1]
    assert shown(batch) == [1.0] * 8 and packed.runs[0].grids_thw == (SMALL,)
    assert tokens.target_N.tolist() == [11, 12, 13, 21, 22, 31, 41, 42]
    assert tokens.hidden_index_N.tolist() == [2, 6, 7, 4, 5, 2, 2, 8]
    assert places(batch) == ([0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 2, 0, 1, 0, 0, 1])


def other_image(response: Response) -> Response:
    """Shows an image of the same size, so that all token ids are the same."""
    prompt = dataclasses.replace(response.prompt, images=(ImageRef("val", 0, 0),))
    return dataclasses.replace(response, prompt=prompt)


def other_grid(response: Response) -> Response:
    """Shows an image with as many tokens, but turned by 90 degrees."""
    return dataclasses.replace(response, prompt=dataclasses.replace(response.prompt, grids_thw=((1, 4, 2),)))


@pytest.mark.parametrize(
    ("second", "view", "sequences"),
    [
        (lambda response: response, View(1, None), 3),
        (lambda response: response, View(1, NOISE), 4),
        (lambda response: response, View(1, PerturbKey(step=1, draw=7)), 4),
        (other_image, View(1, None), 2),
        (other_grid, View(1, None), 2),
    ],
    ids=["equal", "perturbed", "perturbed by another key", "another image", "another grid"],
)
def test_views_share_what_is_equal_in_all_respects(
    second: Callable[[Response], Response], view: View, sequences: int
) -> None:
    response = respond([IMAGE, IMAGE, 5], [11, 12], images=[0])
    original = [View(1, None)] if view.perturb else []
    packing = pack([response, second(response)], [View(0, None), *original, view], shares=True).packed.packing
    assert len(packing.lengths) == sequences and len(packing.prefixes) == (0 if sequences == 2 else 2)


@pytest.mark.parametrize(
    "views",
    [
        [View(0, None), View(1, None), View(0, NOISE)],
        [View(0, NOISE)],
        [View(0, NOISE), View(0, None)],
        [View(0, None), View(1, None), View(1, NOISE), View(0, NOISE)],
    ],
    ids=["of another row", "no original", "first", "in another order"],
)
def test_other_orders_of_views_are_refused(views: list[View]) -> None:
    responses = [respond([IMAGE, IMAGE, 5], [11], images=[0]), respond([IMAGE, IMAGE, 5], [12], images=[0])]
    with pytest.raises(ValueError, match="right before them the original views of the same rows"):
        pack(responses, views)


def test_both_views_of_a_group_with_one_perturbation() -> None:
    """Two prefixes, the original and the perturbed one, each with two continuations."""
    responses = [respond([IMAGE, IMAGE, 5], [11, 12], images=[0]), respond([IMAGE, IMAGE, 5], [21, 22], images=[0])]
    batch = pack(responses, [View(0, None), View(1, None), View(0, NOISE), View(1, NOISE)], shares=True)
    assert batch.packed.packing == Packing((3, 3, 1, 1, 1, 1), prefixes=(0, 0, 1, 1))
    assert batch.tokens.hidden_index_N.tolist() == [2, 6, 2, 7, 5, 8, 5, 9]
    assert (batch.tokens.single, batch.tokens.paired, batch.tokens.perturbed) == (slice(0, 0), slice(0, 4), slice(4, 8))
    assert batch.packed.image_feature_index_I.tolist() == [0, 1, 2, 3]
    assert shown(batch) == [1.0] * 15 + [0.0]


def test_context_parallel_ranks_share_no_prompt() -> None:
    responses = [respond([5, 6, 7], [11, 12]), respond([5, 6, 7], [21, 22])]
    split = dataclasses.replace(WHOLE, context=2)
    packing = pack(responses, [View(0, None), View(1, None)], split, shares=True).packed.packing
    assert packing == Packing((4, 4))
