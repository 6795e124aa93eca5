"""Log-probs of chosen tokens against autograd in float64, on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vppo.parallel.chosen_logps import chosen_logps
from tests.gloo import run_gloo
from tests.parallel.test_vocab_head import NUM_TOKENS, TEMPERATURE, VOCAB_SIZE, Problem, make_head, make_problem, padded

CHOSEN = torch.randint(0, VOCAB_SIZE - 3, (NUM_TOKENS, 4), generator=torch.Generator().manual_seed(8))
CHOSEN[2, 1:3] = CHOSEN[2, 0]
BANNED = (VOCAB_SIZE - 2, VOCAB_SIZE - 1)
GRADIENT = torch.randn(NUM_TOKENS, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def reference(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    hidden_Nh, weight_Vh = p.hidden_Nh.clone().requires_grad_(), p.weight_Vh.clone().requires_grad_()
    logits_NV = (hidden_Nh @ weight_Vh.T / TEMPERATURE).index_fill(1, torch.tensor(BANNED), -1e30)
    logp_NR = logits_NV.log_softmax(1).gather(1, CHOSEN)
    logp_NR.backward(GRADIENT)
    assert hidden_Nh.grad is not None and weight_Vh.grad is not None
    return logp_NR.detach(), hidden_Nh.grad, weight_Vh.grad


def found_by(weight_Vh: Tensor, *, chunk_tokens: int = 4, **where: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden_Nh = make_problem().hidden_Nh.clone().requires_grad_()
    weight_Vh = weight_Vh.clone().requires_grad_()
    head = make_head(weight_Vh, chunk_tokens=chunk_tokens, banned_ids=BANNED, **where)
    logp_NR = chosen_logps(head, hidden_Nh, CHOSEN)
    logp_NR.backward(GRADIENT)
    assert hidden_Nh.grad is not None and weight_Vh.grad is not None
    return logp_NR.detach(), hidden_Nh.grad, weight_Vh.grad


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_one_rank_equals_autograd(chunk_tokens: int) -> None:
    """A token that is chosen several times at a position counts as often."""
    p = make_problem()
    for found, expected in zip(found_by(p.weight_Vh, chunk_tokens=chunk_tokens), reference(p), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_gradient_is_added_where_the_optimizer_sums() -> None:
    p = make_problem()
    sum_Vh = torch.ones_like(p.weight_Vh)
    head = make_head(p.weight_Vh, banned_ids=BANNED, weight_grad_Vh=sum_Vh)
    hidden_Nh = p.hidden_Nh.clone().requires_grad_()
    chosen_logps(head, hidden_Nh, CHOSEN).backward(GRADIENT)
    torch.testing.assert_close(sum_Vh, 1.0 + reference(p)[2], rtol=1e-11, atol=1e-11)


def test_no_positions() -> None:
    p = make_problem()
    found = chosen_logps(make_head(p.weight_Vh), p.hidden_Nh[:0], torch.zeros(0, 1, dtype=torch.int64))
    assert found.shape == (0, 1)


def _rank(rank: int, world: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    mine_Vh = padded(make_problem().weight_Vh, rows * world)[rank * rows : (rank + 1) * rows]
    return found_by(mine_Vh, group=torch.distributed.group.WORLD, vocab_start=rank * rows)


@pytest.mark.distributed
@pytest.mark.parametrize("rows", [19, 40], ids=["last rank part padding", "last rank all padding"])
def test_two_ranks_equal_one(rows: int) -> None:
    logp_NR, grad_hidden_Nh, grad_weight_Vh = reference(make_problem())
    ranks = run_gloo(_rank, 2, rows)
    for logp, grad_hidden, _ in ranks:
        torch.testing.assert_close(logp, logp_NR, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grad_hidden, grad_hidden_Nh, rtol=1e-11, atol=1e-11)
    joined_Vh = torch.cat([weight for _, _, weight in ranks])
    torch.testing.assert_close(joined_Vh[:VOCAB_SIZE], grad_weight_Vh, rtol=1e-11, atol=1e-11)
    assert not joined_Vh[VOCAB_SIZE:].any()
