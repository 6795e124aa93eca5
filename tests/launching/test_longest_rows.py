"""Rows of full length, and the image in them."""

from __future__ import annotations

import pytest

from megatron_vppo.launching.longest_rows import ZeroPixels, image_grid, image_tokens, longest_responses
from tests.launching.runs import IMAGE_TOKENS, PROMPT, RESPONSE, four_layers, run_config
from tests.models.tiny import END, IMAGE, PATCH_VALUES, START


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [(1280, (1, 64, 80)), (12, (1, 6, 8)), (1, (1, 2, 2)), (2, (1, 2, 4)), (13, (1, 6, 8)), (9, (1, 6, 6))],
)
def test_grids_by_hand(tokens: int, grid: tuple[int, int, int]) -> None:
    """Two patches a side to a token. 13 has no two near factors: 12 are as close as it gets."""
    assert image_grid(tokens, merge=2) == grid


def test_every_row_is_as_long_as_it_may_be() -> None:
    responses = longest_responses(run_config(), four_layers())
    assert [(r.group_id, r.sample) for r in responses] == [(g, s) for g in range(4) for s in range(3)]
    for response in responses:
        ids = response.prompt.token_ids
        assert (len(ids), len(response.token_ids)) == (PROMPT, RESPONSE)
        assert (ids.count(IMAGE), ids.count(START), ids.count(END)) == (IMAGE_TOKENS, 1, 1)
        assert response.prompt.grids_thw == ((1, 6, 8),)
    assert len({response.prompt.images for response in responses}) == 4, "each group has an image of its own"
    assert not {IMAGE, START, END} & set(responses[0].token_ids)


def test_an_image_leaves_room_for_its_marks_and_a_word() -> None:
    config = run_config(data={"max_prompt_length": 10, "max_pixels": 100 * 28 * 28})
    assert image_tokens(config, four_layers()) == 7
    assert len(longest_responses(config, four_layers())[0].prompt.token_ids) == 10


def test_pixels_have_the_shape() -> None:
    pixels = ZeroPixels(four_layers(), patches=48)
    pixels_PD = pixels.values(pixels.patches(None, None).bytes_PD)  # type: ignore[arg-type]
    assert pixels_PD.shape == (48, PATCH_VALUES) and not pixels_PD.any()
