"""VGPO's weights and scales, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.vgpo import vgpo_scales, vgpo_token_weights, visual_accumulation

MASK = torch.tensor([[1.0] * 10, [1.0] * 4 + [0.0] * 6])
SCORE = torch.tensor([[0.5, 0.9, 0.2, 0.4, 0.6, 0.5, 0.8, 0.8, 0.3, 0.1], [0.4, 0.4, 0.6, 0.2] + [7.0] * 6])


def test_the_best_of_the_last_tokens_are_raised() -> None:
    """Row 1: of the last 5 tokens one is raised, and its equal: 0.8 (1 + 0.3 x 7/10) = 0.968, 0.8 x 1.24 = 0.992.
    Row 2: of the last 2, max(1, floor(0.4)) = 1: 0.6 (1 + 0.3 x 3/4) = 0.735. Then from the smallest to the largest.
    """
    found = visual_accumulation(SCORE, MASK, strength=0.3, tail=0.5, top=0.2)
    raised = [0.5, 0.9, 0.2, 0.4, 0.6, 0.5, 0.968, 0.992, 0.3, 0.1]
    assert found[0].tolist() == pytest.approx([(s - 0.1) / 0.892 for s in raised], abs=1e-7)
    expected = [0.2 / 0.535, 0.2 / 0.535, 1.0, 0.0]
    assert found[1].tolist() == pytest.approx(expected + [0.0] * 6, abs=1e-7)


def test_strength_tail_and_top() -> None:
    plain = visual_accumulation(SCORE, MASK, strength=0.0, tail=0.5, top=0.2)
    assert plain[1, :4].tolist() == pytest.approx([0.5, 0.5, 1.0, 0.0], abs=1e-7)
    whole = visual_accumulation(SCORE[1:], MASK[1:], strength=1.0, tail=1.0, top=1.0)
    raised = [0.4 * 1.25, 0.4 * 1.5, 0.6 * 1.75, 0.2 * 2.0]  # 0.5, 0.6, 1.05, 0.4
    assert whole[0, :4].tolist() == pytest.approx([(s - 0.4) / 0.65 for s in raised], abs=1e-6)
    tenth = visual_accumulation(SCORE[:1], MASK[:1], strength=1.0, tail=0.1, top=1.0)  # the last token alone: 0.1 x 2
    assert tenth[0, [2, 9]].tolist() == pytest.approx([0.0, 0.0], abs=1e-7), "now both are 0.2"
    assert visual_accumulation(torch.zeros(1, 1), torch.zeros(1, 1), strength=1.0, tail=0.5, top=0.2).tolist() == [[0]]


def test_token_weights_have_the_mean_one() -> None:
    """Values 0, 1, 1, 1, 1 have the mean 0.8: 1 - 0.8 = 0.2. Of 20, of which one is 0, it is 0.05, and 0.1 at least."""
    accumulation = torch.tensor([[0.0] + [1.0] * 19, [0.0] + [1.0] * 4 + [0.0] * 15], dtype=torch.float64)
    mask = torch.tensor([[1.0] * 20, [1.0] * 5 + [0.0] * 15])
    found = vgpo_token_weights(accumulation, mask)
    assert found[0].tolist() == pytest.approx([0.1] + [1.05] * 19)
    assert found[1].tolist() == pytest.approx([0.2] + [1.2] * 4 + [0.0] * 15)
    assert found[1].sum().item() == pytest.approx(5)


def test_scales_compare_the_responses_to_a_prompt() -> None:
    """Sums 1, 2, 3 of one prompt: 0, 1/2, 1 less 1/2: 0.5, 1, 1.5, and 0.9 at least. 4 and 4 of another are equal. A
    row that does not count changes nothing: its 9 would be the largest.
    """
    sums = torch.tensor([1.0, 4.0, 2.0, 9.0, 3.0, 4.0], dtype=torch.float64)
    counted = torch.tensor([True, True, True, False, True, True])
    found = vgpo_scales(sums[:, None] / 2 * torch.ones(1, 2), counted, torch.tensor([0, 7, 0, 0, 0, 7]))
    assert found.tolist() == pytest.approx([0.9, 1.0, 1.0, 1.0, 1.5, 1.0])
