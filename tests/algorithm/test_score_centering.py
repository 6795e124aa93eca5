"""The term of score centering against its definition over the whole vocabulary, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vppo.algorithm.score_centering import score_centering

VOCAB = 7


def mean_score(p_NV: Tensor, q_NV: Tensor, cap: float | None) -> Tensor:
    """The mean over q of w (e_v - p), the gradient of log p_v by the logits."""
    weight_NV = torch.ones_like(p_NV) if cap is None else (p_NV / q_NV).clamp(max=cap)
    return q_NV * weight_NV - (q_NV * weight_NV).sum(1, keepdim=True) * p_NV


@pytest.mark.parametrize("cap", [None, 1.1, 100.0])
@pytest.mark.parametrize("likeliest", [1, 3, VOCAB])
def test_gradient_is_the_mean_score(likeliest: int, cap: float | None) -> None:
    """Outside of the likeliest tokens q is taken to be p times a number. With all tokens there is no outside."""
    generator = torch.Generator().manual_seed(likeliest)
    logits_NV = (2 * torch.randn(4, VOCAB, generator=generator, dtype=torch.float64)).requires_grad_()
    q_NV = (logits_NV.detach() + torch.randn(4, VOCAB, generator=generator, dtype=torch.float64)).softmax(1)
    p_NV, ids_NR = logits_NV.detach().softmax(1), q_NV.topk(likeliest, dim=1).indices
    expected_q_NV = p_NV * (1 - q_NV.gather(1, ids_NR).sum(1, keepdim=True))
    expected_q_NV /= (1 - p_NV.gather(1, ids_NR).sum(1, keepdim=True)).clamp(min=1e-12)
    expected_q_NV = expected_q_NV.scatter(1, ids_NR, q_NV.gather(1, ids_NR))
    assert expected_q_NV.sum(1).tolist() == pytest.approx([1.0] * 4)
    term_N = score_centering(logits_NV.log_softmax(1).gather(1, ids_NR), q_NV.log().gather(1, ids_NR), cap=cap)
    term_N.sum().backward()
    assert logits_NV.grad is not None
    torch.testing.assert_close(logits_NV.grad, mean_score(p_NV, expected_q_NV, cap), rtol=1e-9, atol=1e-9)
    assert logits_NV.grad.abs().max() > (0.01 if cap != 100.0 else -1), "p and q differ"


def test_a_weight_without_a_cap_that_holds_leaves_no_drift() -> None:
    """q p / q is p, over which the mean score is zero."""
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    q_NR = torch.tensor([[0.4, 0.3]], dtype=torch.float64)
    score_centering(logits.log_softmax(1)[:, :2], q_NR.log(), cap=1e9).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-9


def test_a_centred_score_by_hand() -> None:
    """p = (0.6, 0.4), q = (0.5, 0.5): the mean score is q - p = (-0.1, 0.1). No other tokens are left."""
    logits = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log().requires_grad_()
    score_centering(logits.log_softmax(1), torch.tensor([[0.5, 0.5]]).double().log(), cap=None).sum().backward()
    assert logits.grad is not None and logits.grad[0].tolist() == pytest.approx([-0.1, 0.1])


def test_a_token_that_the_engine_cannot_sample() -> None:
    """Its probability is zero by both, as that of a banned one is."""
    logits = torch.tensor([[0.0, 1.0, -1e30]], requires_grad=True)
    term_N = score_centering(logits.log_softmax(1), torch.tensor([[-1.0, -0.5, -torch.inf]]), cap=2.0)
    term_N.sum().backward()
    assert term_N.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
