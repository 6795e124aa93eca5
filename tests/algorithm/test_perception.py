"""PAPO's perception loss: numbers worked out by hand, its weights, and rows without an image."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from megatron_vppo.algorithm.assemble import assemble
from megatron_vppo.algorithm.loss import surrogate_loss
from megatron_vppo.algorithm.perception import PerturbedView, perception_loss
from megatron_vppo.algorithm.types import PerturbKey, Scores, TokenPerception, TrainBatch
from tests.algorithm.rows import graded, response, scores, settings

PAPO = {
    "use_vppo_on_perception": False,
    "use_advantage_shaping": False,
    "use_entropy_penalty": False,
    "perception_loss_coef": 0.5,
}


def test_two_tokens_by_hand() -> None:
    """Probabilities 1/4 and 1/8 given the images, 1/8 and 1/2 without: ratios 1/2 and 4.

    k3 is 1/2 - 1 + log 2 and 4 - 1 - log 4; its derivative by the original log-prob is 1 - ratio, and by the perturbed
    one ratio - 1. The entropy term lowers -log of 1/8 and of 1/2.
    """
    logp_N = torch.tensor([1 / 4, 1 / 8]).log().requires_grad_()
    perturbed_N = torch.tensor([1 / 8, 1 / 2]).log().requires_grad_()
    terms = TokenPerception(torch.tensor([0.5, 0.25]), torch.tensor([0.1, 0.2]), None)
    found = perception_loss(logp_N, PerturbedView(perturbed_N), terms, entropy_kind="nll")
    k3 = (0.5 - 1 + math.log(2), 4 - 1 - math.log(4))
    perception, penalty = -0.5 * k3[0] - 0.25 * k3[1], 0.1 * math.log(8) + 0.2 * math.log(2)
    assert found.loss.item() == pytest.approx(perception + penalty, rel=1e-6)
    assert {name: value.item() for name, value in {**found.weighted_sums, **found.token_sums}.items()} == pytest.approx(
        {
            "actor/perception_loss": perception,
            "actor/perturbed_entropy_penalty": penalty,
            "actor/kl_prcp_loss": -sum(k3),
            "actor/aug_entropy_loss": math.log(8) + math.log(2),
        },
        rel=1e-6,
    )
    found.loss.backward()
    assert logp_N.grad is not None and perturbed_N.grad is not None
    assert logp_N.grad.tolist() == pytest.approx([-0.5 * (1 - 0.5), -0.25 * (1 - 4)], rel=1e-6)
    assert perturbed_N.grad.tolist() == pytest.approx([-0.5 * (0.5 - 1) - 0.1, -0.25 * (4 - 1) - 0.2], rel=1e-6)


def test_tokens_beyond_the_limits_have_no_gradient() -> None:
    """e^3 - 1 - 3 is 16, and a difference of -25 gives 24, or 19 as -20: all above 10."""
    logp_N = torch.tensor([-4.0, -1.0]).requires_grad_()
    view = PerturbedView(torch.tensor([-1.0, -26.0]))
    found = perception_loss(logp_N, view, TokenPerception(torch.ones(2), None, None), entropy_kind="nll")
    assert found.loss.item() == -20
    found.loss.backward()
    assert logp_N.grad is not None and logp_N.grad.tolist() == [0, 0]


def test_the_entropy_term_is_of_the_kind_that_is_set() -> None:
    logp_N, weight_N = torch.tensor([-1.0]), torch.tensor([2.0])
    terms = TokenPerception(torch.zeros(1), weight_N, None)

    def loss(kind: str) -> float:
        view = PerturbedView(torch.tensor([-3.0]), torch.tensor([0.5]))
        return perception_loss(logp_N, view, terms, entropy_kind=kind).loss.item()

    assert (loss("nll"), loss("entropy")) == (6.0, 1.0)


# --- Mini-batches -----------------------------------------------------------------------------------------------------


def batch_of(**changes: Any) -> TrainBatch:
    """Two groups of two responses of 4, 2 | 3, 1 tokens; the second group has no image."""
    lengths = (4, 2, 3, 1)
    rows = [response(n, group=i // 2, sample=i % 2, image=i < 2) for i, n in enumerate(lengths)]
    keys = tuple(PerturbKey(5, i) if i < 2 else None for i in range(4))
    seen: Scores = dataclasses.replace(scores(torch.full((4, 4), -1.0), torch.full((4, 4), -2.0)), perturb_keys=keys)
    (minibatch,) = assemble(
        graded(rows, [1.0, 0, 0, 1]), seen, settings=settings(**{**PAPO, **changes}), responses_per_minibatch=4,
        longest_response=8,
    )  # fmt: skip
    return minibatch.batch


def test_weights_are_means_over_all_tokens_of_terms_that_have_an_image() -> None:
    perception = batch_of(perturbed_entropy_coef=0.3).perception
    assert perception is not None and perception.entropy_weight_BT is not None
    seen_BT = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [0] * 4, [0] * 4])
    torch.testing.assert_close(perception.weight_BT, 0.5 / 10 * seen_BT)
    torch.testing.assert_close(perception.entropy_weight_BT, 0.3 / 10 * seen_BT)
    assert perception.perturb_keys == (PerturbKey(5, 0), PerturbKey(5, 1), None, None)
    assert perception.perturbed_logp_BT is None


def test_weights_follow_the_kind_of_mean() -> None:
    by_row = batch_of(loss_avg_mode="seq").perception
    fixed = batch_of(loss_avg_mode="fixed_length").perception
    assert by_row is not None and fixed is not None
    assert by_row.weight_BT.sum(1).tolist() == pytest.approx([0.5 / 4, 0.5 / 4, 0, 0])
    assert fixed.weight_BT[:2, 0].tolist() == pytest.approx([0.5 / 8 / 4] * 2)


def test_truncated_rows_have_no_term() -> None:
    rows = [response(2, sample=0), response(2, sample=1, finish="length")]
    seen = dataclasses.replace(
        scores(torch.full((2, 2), -1.0), None), perturb_keys=(PerturbKey(1, None), PerturbKey(1, None))
    )
    chosen = settings(**PAPO, truncated_responses="mask")
    (minibatch,) = assemble(graded(rows, [1.0, 0]), seen, settings=chosen, responses_per_minibatch=2)
    assert minibatch.batch.perception is not None
    assert minibatch.batch.perception.weight_BT.tolist() == [[0.25, 0.25], [0, 0]]


def test_a_constant_view_comes_from_the_scores() -> None:
    """Every token: k3 of x = -1 is 1/e; only the 6 tokens of rows with an image have it in the loss."""
    batch = batch_of(perception_gradient="original_view")
    perception = batch.perception
    assert perception is not None and perception.perturb_keys is None and perception.entropy_weight_BT is None
    at = batch.response_mask_BT.nonzero(as_tuple=True)
    new_logp_N = batch.old_logp_BT[at].clone().requires_grad_()
    found = surrogate_loss(new_logp_N, batch.terms_at(at), spec=batch.loss)
    assert found.weighted_sums["actor/perception_loss"].item() == pytest.approx(-0.5 * 6 / 10 / math.e)
    parts = sum(value.item() for name, value in found.weighted_sums.items() if name != "actor/loss")
    assert found.loss.item() == pytest.approx(parts)
    assert "actor/perturbed_entropy_penalty" not in found.weighted_sums


@pytest.mark.parametrize("loss", ["clip", "gspo"])
def test_every_loss_takes_it(loss: str) -> None:
    """The perturbed view is the first argument that the surrogate does not know of: the sum of both stays the loss."""
    batch = batch_of(policy_loss=loss)
    at = batch.response_mask_BT.nonzero(as_tuple=True)
    logp_N = batch.old_logp_BT[at]
    view = PerturbedView(logp_N - math.log(2))
    with_it = surrogate_loss(logp_N, batch.terms_at(at), spec=batch.loss, perturbed=view)
    without = dataclasses.replace(batch, perception=None)
    plain = surrogate_loss(logp_N, without.terms_at(at), spec=batch.loss)
    k3 = 0.5 - 1 + math.log(2)
    assert with_it.loss.item() - plain.loss.item() == pytest.approx(-0.5 * 6 / 10 * k3, abs=1e-7)


def test_scores_without_what_it_needs() -> None:
    rows = graded([response(2, sample=i) for i in range(2)], [1.0, 0.0])
    bare = scores(torch.full((2, 2), -1.0), None)
    with pytest.raises(ValueError, match="0 perturb_keys for 2 responses"):
        assemble(rows, bare, settings=settings(**PAPO), responses_per_minibatch=2)
    constant = settings(**PAPO, perception_gradient="original_view", dependency="jsd")
    with pytest.raises(ValueError, match="needs perturbed_logp_BT"):
        assemble(
            rows,
            scores(torch.full((2, 2), -1.0), None, divergence_BT=torch.zeros(2, 2)),
            settings=constant,
            responses_per_minibatch=2,
        )
    assert constant.needs_perturbed_view and not constant.needs_dependency and not constant.updates_both_views
    assert settings(**PAPO).updates_both_views and not settings(**PAPO).needs_perturbed_view
