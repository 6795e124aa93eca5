"""Rotary positions of text and images, against transformers and by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from megatron_vppo.models.language.mrope import mrope_positions
from tests.models.tiny import GRIDS, IMAGE, MERGE, make_rows, tiny_config


def test_mrope_positions() -> None:
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tied=False, vocab=301))
    for row in make_rows():
        if not row.images:
            continue
        ids = torch.tensor([row.token_ids])
        grids = [GRIDS[name] for name in row.images]
        expected, _ = model.model.get_rope_index(ids, (ids == IMAGE).int(), torch.tensor(grids))
        found = mrope_positions(row.token_ids, grids, image_token_id=IMAGE, merge_size=MERGE)
        assert torch.equal(found, expected[:, 0])


def test_mrope_positions_by_hand() -> None:
    found = mrope_positions([5, IMAGE, IMAGE, 6], [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)
    assert found.tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    assert mrope_positions([4, 4], [], image_token_id=IMAGE, merge_size=2).tolist() == [[0, 1]] * 3
    with pytest.raises(ValueError, match=r"1 image tokens.*need 2"):
        mrope_positions([5, IMAGE, 6], [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)
    with pytest.raises(ValueError, match="interrupted"):
        mrope_positions([IMAGE, 6, IMAGE], [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)
