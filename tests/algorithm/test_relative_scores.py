"""Scores in relation to their response, by hand."""

from __future__ import annotations

import torch

from megatron_vppo.algorithm.relative_scores import relative_in_response


def test_from_the_smallest_to_the_largest_of_the_response() -> None:
    score_BT = torch.tensor([[2.0, 6, 3, -9], [5, 5, 99, 99], [-1, 1, 0, 3]])
    mask_BT = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert relative_in_response(score_BT, mask_BT).tolist() == [[0, 1, 0.25, 0], [0, 0, 0, 0], [0, 0.5, 0.25, 1]]
