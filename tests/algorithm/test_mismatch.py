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
    on_it = rollout_mismatch(responses, scores, bound=0.25)
    assert on_it["training/rollout_logp_diff_frac_over"] == 0.0, "the largest difference is the bound"
    assert metrics["actor/entropy"] == pytest.approx(1.0)
    # Differences 0, 0.25, 0.1 and 0: (1 + e^0.25 + e^0.1 + 1) / 4. The float32 log-prob -2.9 is off by 1e-7.
    assert metrics["training/token_mult_prob_error"] == pytest.approx(
        (2 + 1.2840254166877414 + 1.1051709180756477) / 4, rel=1e-7
    )


def test_multiplicative_error_of_one_token_that_the_engine_thought_impossible() -> None:
    """e^99 is more than float32 holds; such a token has to show as a large number, and not as infinity."""
    responses = [Response(PROMPT, 0, 0, (4, 5), (-100.0, -1.0), "stop", 0)]
    old = torch.tensor([[-1.0, -1.0]])
    scores = Scores(old_logp_BT=old, entropy_BT=torch.ones(1, 2), perturbed_logp_BT=None, divergence_BT=None)
    error = rollout_mismatch(responses, scores, bound=0.2)["training/token_mult_prob_error"]
    assert error == pytest.approx((9.889030319346946e42 + 1) / 2, rel=1e-12)


def test_tokens_of_older_weights_are_left_out() -> None:
    responses = [
        Response(PROMPT, 0, 0, (4, 5, 6), (-9.0, -9.0, -3.0), "stop", 0, 2),
        Response(PROMPT, 0, 1, (4,), (-9.0,), "stop", 0, 1),
    ]
    old = torch.tensor([[-1.0, -1.0, -2.5], [-1.0, 9.0, 9.0]])
    scores = Scores(old_logp_BT=old, entropy_BT=torch.ones(2, 3), perturbed_logp_BT=None, divergence_BT=None)
    metrics = rollout_mismatch(responses, scores, bound=0.2)
    assert metrics["training/rollout_logp_diff_mean"] == metrics["training/rollout_logp_diff_max"] == 0.5
    none = rollout_mismatch(responses[1:], Scores(old[1:, :1], torch.ones(1, 1), None, None), bound=0.2)
    assert none == {"actor/entropy": 1.0}
