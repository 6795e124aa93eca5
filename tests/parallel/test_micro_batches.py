"""Groups of data-parallel ranks, and the micro-batches that a rank's rows fill, by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from megatron_vppo.algorithm.types import Response
from megatron_vppo.config.choices import PerturbUnit
from megatron_vppo.parallel.micro_batches import (
    Reading,
    Rows,
    cut_by_rows,
    fill_by_tokens,
    groups_of_rank,
    packed_tokens,
)
from tests.parallel.responses import respond

APART = Reading(shares_prompts=False, perturb_per=None, patch_work=0.0)
SHARED = dataclasses.replace(APART, shares_prompts=True)


def group(number: int, prompt: int, lengths: Sequence[int], *, images: Sequence[int] = ()) -> list[Response]:
    """A prompt of `prompt` tokens, and a response for each length."""
    rows = [respond([1] * prompt, [2] * length, images=images, group=number) for length in lengths]
    return [dataclasses.replace(row, sample=sample) for sample, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("shares", "per", "tokens"),
    [
        (False, None, 3 * 10 + 6),
        (True, None, 10 + 6),
        (True, "row", 10 + 6 + 3 * 10 + 6),
        (True, "image", 2 * (10 + 6)),
        (False, "image", 2 * (3 * 10 + 6)),
        (True, 2, 10 + 6 + 2 * 10 + 6),
        (True, 9, 10 + 6 + 3 * 10 + 6),
    ],
)
def test_tokens_of_a_group(shares: bool, per: PerturbUnit | None, tokens: int) -> None:
    """A prompt of 10 tokens with responses of 4, 1 and 4, of which 3, 0 and 3 are read."""
    reading = Reading(shares_prompts=shares, perturb_per=per, patch_work=0.0)
    rows = group(0, 10, (4, 1, 4), images=[0])
    assert reading.tokens(rows) == tokens
    assert reading.tokens(rows[:1]) == (13 if per is None else 26), "a row alone shares with nobody"


def test_a_group_without_images_has_one_view() -> None:
    assert dataclasses.replace(SHARED, perturb_per="row").tokens(group(0, 10, (4, 1, 4))) == 16


@pytest.mark.parametrize(("per", "towers"), [(None, 1), ("image", 2), ("row", 3), (1, 2), (2, 3)])
def test_work_counts_each_view_of_the_images(per: PerturbUnit | None, towers: int) -> None:
    """Images of 8 and 16 patches, each worth half a token; two responses of one token that is not read."""
    reading = Reading(shares_prompts=True, perturb_per=per, patch_work=0.5)
    rows = group(0, 10, (1, 1), images=[0, 1])
    assert reading.work(rows) == reading.tokens(rows) + towers * 12


@pytest.mark.parametrize(("data", "rows"), [(1, [(0, 2, 1, 3, 4, 5)]), (2, [(0, 2, 5), (1, 3, 4)])])
def test_a_rank_gets_whole_groups(data: int, rows: list[Rows]) -> None:
    """Groups of 9, 8, 7 and 1 tokens to read: with the first goes the last, as in test_balancing."""
    lengths, groups = (5, 8, 4, 3, 4, 1), (0, 1, 0, 2, 2, 3)
    responses = [respond([1] * n, [2], group=number) for n, number in zip(lengths, groups, strict=True)]
    for rank in range(data):
        found = groups_of_rank(responses, data_rank=rank, data=data, reading=APART)
        assert tuple(row for of_group in found for row in of_group) == rows[rank]


def test_images_weigh_in_the_balance() -> None:
    """Three groups of equal tokens; the one with an image of 16 patches at two tokens each has a rank for itself."""
    responses = [*group(0, 6, (2,)), *group(1, 6, (2,), images=[1]), *group(2, 6, (2,)), *group(3, 6, (2,))]
    heavy = dataclasses.replace(APART, patch_work=2.0)
    assert groups_of_rank(responses, data_rank=0, data=2, reading=heavy) == [(1,), (3,)]
    assert groups_of_rank(responses, data_rank=0, data=2, reading=APART) == [(0,), (2,)]


def test_a_rank_without_a_group() -> None:
    assert [groups_of_rank([respond([1], [2])], data_rank=n, data=2, reading=APART) for n in (0, 1)] == [[(0,)], []]


def test_groups_that_fit_stay_whole() -> None:
    assert cut_by_rows([(0, 2), (1, 3, 4), (5,)], rows_each=4) == [(0, 2), (1, 3, 4, 5)]
    assert cut_by_rows([(0, 2), (1, 3, 4), (5,)], rows_each=6) == [(0, 2, 1, 3, 4, 5)]
    assert cut_by_rows([(0,), (1,), (2,)], rows_each=2) == [(0, 1), (2,)]
    assert cut_by_rows([], rows_each=2) == []


def test_rows_of_larger_groups_fill_micro_batches() -> None:
    assert cut_by_rows([(0, 2), (1, 3, 4)], rows_each=2) == [(0, 2), (1, 3), (4,)]
    assert cut_by_rows([(0, 2, 1), (3, 4, 5)], rows_each=2) == [(0, 2), (1, 3), (4, 5)]
    assert cut_by_rows([tuple(range(5)), (5, 6)], rows_each=4) == [(0, 1, 2, 3), (4, 5, 6)]
    assert cut_by_rows([(0, 2, 1)], rows_each=1) == [(0,), (2,), (1,)]


def test_groups_fill_micro_batches_whole() -> None:
    """Shared groups of 11, 30, 19 and 12 tokens into micro-batches of 31: 11 and 19, 30, 12. They are padded to 31, 31
    and 19."""
    responses = [*group(0, 9, (2, 2)), *group(1, 26, (3, 3)), *group(2, 9, (6, 6)), *group(3, 10, (2, 2))]
    groups = groups_of_rank(responses, data_rank=0, data=1, reading=SHARED)
    filled = fill_by_tokens(responses, groups, most_tokens=31, reading=SHARED)
    assert filled == [(0, 1, 4, 5), (2, 3), (6, 7)]
    assert [packed_tokens(responses, rows, reading=SHARED) for rows in filled] == [30, 30, 12]


def test_a_group_that_is_too_large_is_cut_as_seldom_as_possible() -> None:
    """A prompt of 10 tokens and responses of which 4 each are read: three of them are 22 tokens, four 26."""
    responses = group(0, 10, (5,) * 7)
    filled = fill_by_tokens(responses, [tuple(range(7))], most_tokens=25, reading=SHARED)
    assert filled == [(0, 1, 2), (3, 4, 5), (6,)]
    assert fill_by_tokens(responses, [tuple(range(7))], most_tokens=38, reading=SHARED) == [tuple(range(7))]
    assert fill_by_tokens(responses, [(0, 1)], most_tokens=9, reading=SHARED) == [(0,), (1,)], "larger than allowed"
