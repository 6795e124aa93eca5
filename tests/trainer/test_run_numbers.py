"""Small numbers of the loop: rollout mismatch, when validation and checkpoints are due."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.mismatch import rollout_mismatch
from megatron_vppo.algorithm.types import Prompt, Response, Scores
from megatron_vppo.trainer.loop import is_due

PROMPT = Prompt("train", 0, "q", "a", (1,), (1,), (), ())


def test_mismatch_counts_response_tokens_only() -> None:
    responses = [
        Response(PROMPT, 0, 0, (4, 5, 6), (-1.0, -2.0, -3.0), "stop", 0),
        Response(PROMPT, 0, 1, (4,), (-0.5,), "length", 0),
    ]
    old = torch.tensor([[-1.0, -2.25, -2.9], [-0.5, 9.0, 9.0]])
    scores = Scores(old_logp_BT=old, entropy_BT=torch.ones(2, 3), perturbed_logp_BT=None, divergence_BT=None)
    metrics = rollout_mismatch(responses, scores, bound=0.2)
    assert metrics["training/rollout_logp_diff_mean"] == pytest.approx((0.25 + 0.1) / 4)
    assert metrics["training/rollout_logp_diff_max"] == pytest.approx(0.25)
    assert metrics["training/rollout_logp_diff_frac_over"] == pytest.approx(1 / 4)
    assert metrics["actor/entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize("step, freq, due", [(5, 5, True), (4, 5, False), (7, 5, True), (3, -1, False), (7, -1, True)])
def test_due_every_so_many_steps_and_after_the_last(step: int, freq: int, due: bool) -> None:
    assert is_due(step, freq, total_steps=7) is due
