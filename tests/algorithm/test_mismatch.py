"""The difference between the log-probs of engine and trainer, as metrics."""

from __future__ import annotations

import pytest
import torch

from megatron_vppo.algorithm.mismatch import rollout_mismatch
from megatron_vppo.algorithm.types import Prompt, Response, Scores

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
