"""The scales of a step's responses: which rows they compare, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vppo.algorithm.response_scales import response_scales
from tests.algorithm.rows import response, settings

ROWS = [response(1, group=group, sample=sample) for group in range(2) for sample in range(3)]
DEPENDENCY = torch.tensor([[0.1], [0.2], [0.3], [0.5], [0.5], [0.9]])


def scales(*lengths: int, rows: list[Any] = ROWS, **changes: Any) -> list[list[float]]:
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    found = response_scales(
        rows,
        DEPENDENCY,
        [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)],
        settings=settings(**changes),
        devices=1,
        micro_batch_size=1,
    )
    return [scale.scale_B.tolist() for scale in found]


def test_vppo_compares_the_rows_of_a_minibatch() -> None:
    """0.9 + 0.1 (S - min) / (mean - min): of 0.1, 0.2, 0.3 the mean is 0.2; of 0.5, 0.5, 0.9 it is 0.5 + 0.4/3."""
    first, second = scales(3, 3)
    assert first == pytest.approx([0.9, 1.0, 1.1], abs=1e-5)
    assert second == pytest.approx([0.9, 0.9, 1.2], abs=1e-5)


def test_vgpo_compares_the_responses_to_a_prompt_wherever_minibatches_end() -> None:
    """A response of one token has the value zero by itself, so tokens are two: the second is the larger."""
    vgpo = {"shaping_kind": "vgpo", "dependency": "visual_focus", "vgpo_strength": 0.0}
    assert scales(6, **vgpo) == [[1.0] * 6], "of one token each"
    rows = [response(3, group=group, sample=sample) for group in range(2) for sample in range(3)]
    dependency = torch.tensor([[0.0, 0.25, 1], [0, 0.5, 1], [0, 0.75, 1], [0, 1, 1], [0, 0.0, 1], [0, 1, 1]])
    found = response_scales(
        rows, dependency, [slice(0, 4), slice(4, 6)], settings=settings(**vgpo), devices=1, micro_batch_size=1
    )
    # Sums 1.25, 1.5 and 1.75: 0, 1/2 and 1, less 1/2. Then 2, 1 and 2: 1, 0 and 1, less 2/3.
    assert found[0].scale_B.tolist() == pytest.approx([0.9, 1.0, 1.5, 1 + 1 / 3])
    assert found[1].scale_B.tolist() == pytest.approx([0.9, 1 + 1 / 3])


def test_rows_without_an_image_or_left_out_have_the_scale_one() -> None:
    rows = [response(1, image=False), *ROWS[1:3], response(1, group=1, finish="length"), *ROWS[4:]]
    (found,) = scales(6, rows=rows, truncated_responses="mask")
    # 0.2, 0.3, 0.5 and 0.9 are left: the mean is 0.475, so 0.9 + 0.1 (S - 0.2) / 0.275.
    assert found == pytest.approx([1.0, 0.9, 0.9 + 0.1 / 2.75, 1.0, 0.9 + 0.3 / 2.75, 0.9 + 0.7 / 2.75], abs=1e-5)


def test_no_shaping() -> None:
    assert scales(4, 2, use_advantage_shaping=False) == [[1.0] * 4, [1.0] * 2]
