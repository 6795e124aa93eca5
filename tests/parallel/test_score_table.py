"""Scores by row and column, and their sum over ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.parallel.batching import ResponseTokens
from megatron_vppo.parallel.layout import single_rank
from megatron_vppo.parallel.score_table import ScoreTable
from megatron_vppo.parallel.vocab_head import TwoViews


@pytest.mark.parametrize("counts", [True, False])
def test_scores_by_hand(counts: bool) -> None:
    """Two tokens of two responses of up to three; the ranks whose scores do not count add nothing."""
    none_N = torch.zeros(2, dtype=torch.int64)
    tokens = ResponseTokens(none_N, none_N, at=(torch.tensor([1, 0]), torch.tensor([0, 2])), num_perturbed=0)
    views = TwoViews(*(torch.tensor([number, number + 0.5]) for number in (1.0, 2.0, 3.0, 4.0, 5.0)))
    table = ScoreTable(2, 3, device=torch.device("cpu"))
    table.write_two_views(tokens, views)
    table.write_visual_focus((torch.tensor([1, 0]), torch.tensor([0, 2])), torch.tensor([6.0, 6.5]))
    with single_rank():
        whole = table.sum_over_ranks(counts=counts)
    found = (
        whole.logp_BT, whole.entropy_BT, whole.perturbed_logp_BT,
        whole.divergence_BT, whole.perturbed_entropy_BT, whole.visual_focus_BT,
    )  # fmt: skip
    for number, table_BT in enumerate(found, start=1):
        assert table_BT.tolist() == ([[0, 0, number + 0.5], [number, 0, 0]] if counts else [[0] * 3] * 2)
