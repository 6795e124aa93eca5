"""The token counts of micro-batches, and their filling: small cases by hand, realistic ones by what has to hold."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from megatron_vppo.parallel.token_counts import fill, padded_tokens, token_counts

LIMIT = 24_576


def test_counts_are_parts_of_the_limit() -> None:
    assert token_counts(LIMIT) == (24_576, 23_040, 21_504, 15_360)
    assert token_counts(16) == (16, 15, 14, 10)
    assert token_counts(1) == (1,)


@pytest.mark.parametrize(
    ("tokens", "padded"), [(1, 1), (10, 10), (11, 11), (12, 12), (13, 14), (15, 15), (16, 16), (17, 17), (40, 40)]
)  # fmt: skip
def test_padding_goes_to_the_next_count(tokens: int, padded: int) -> None:
    assert padded_tokens(tokens, limit=16) == padded


def test_between_counts_and_beyond_padding_goes_to_a_multiple_of_a_sixteenth() -> None:
    assert [padded_tokens(tokens, limit=160) for tokens in (101, 115, 161, 170, 171)] == [110, 120, 170, 170, 180]


def test_a_tenth_is_added_at_most() -> None:
    assert [padded_tokens(tokens, limit=1600) for tokens in (90, 91, 890, 909, 910)] == [90, 100, 900, 909, 1000]


def sums(sizes: list[int], limit: int) -> list[int]:
    return sorted(sum(sizes[part] for part in parts) for parts in fill(sizes, limit=limit))


def test_micro_batches_lie_just_below_the_counts() -> None:
    """Forty tokens fit 10 + 15 + 15. The first micro-batch that has room would take 16, 16 and 8."""
    sizes = [9, 8, 6, 5, 4, 4, 3, 1]
    assert sums(sizes, 16) == [10, 15, 15]
    assert sorted(itertools.chain.from_iterable(fill(sizes, limit=16))) == list(range(8))


def test_parts_change_places_until_they_fit() -> None:
    """The largest first, each where most room is, leads to 8 + 5 + 4 and 7 + 6 + 2; then 8 and 7 change places. The
    first micro-batch that has room would leave the 2 over.
    """
    assert sums([8, 7, 6, 5, 4, 2], 16) == [16, 16]


def test_what_does_not_fit_together_has_micro_batches_of_its_own() -> None:
    assert sums([9, 9, 9], 16) == [9, 9, 9]
    assert sums([20, 3, 40], 16) == [3, 20, 40]
    assert fill([], limit=16) == []


def realistic(draw: random.Random, groups: int) -> list[int]:
    """Draws the tokens of groups of eight responses that share a prompt with one image."""
    sizes = []
    for _ in range(groups):
        image = min(1280.0, max(64.0, draw.lognormvariate(math.log(600), 0.7)))
        responses = [min(4096.0, max(16.0, draw.lognormvariate(math.log(380), 0.6))) for _ in range(8)]
        sizes.append(round(image + draw.randint(40, 250) + sum(responses)))
    return sizes


@pytest.mark.parametrize(("limit", "groups"), [(LIMIT, 32), (LIMIT, 64), (40_960, 32), (16_384, 32), (2 * LIMIT, 96)])
def test_a_run_has_four_counts_and_three_percent_of_padding(limit: int, groups: int) -> None:
    draw = random.Random(7)
    real, padded, counts = 0, 0, set()
    for _ in range(9):
        sizes = realistic(draw, groups)
        filled = fill(sizes, limit=limit)
        assert sorted(itertools.chain.from_iterable(filled)) == list(range(groups))
        assert len(filled) <= math.ceil(1.01 * sum(sizes) / limit), "as few as can be, nearly"
        of_micro_batches = [padded_tokens(sum(sizes[part] for part in parts), limit=limit) for parts in filled]
        counts |= set(of_micro_batches)
        real, padded = real + sum(sizes), padded + sum(of_micro_batches)
    assert counts <= set(token_counts(limit))
    assert 1 - real / padded <= 0.03


def test_equal_parts_that_fit_badly_are_no_trouble() -> None:
    """The dry run of a large step has as many: one fits, or three together."""
    assert len(fill([15_000] * 768, limit=LIMIT)) == 768
    assert len(fill([8_000] * 768, limit=LIMIT)) == 256
