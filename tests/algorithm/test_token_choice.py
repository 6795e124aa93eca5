"""The tokens that carry policy gradient, by each kind of score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.soft_weights import pgpo_weights, sigmoid_weights
from megatron_vppo.algorithm.token_choice import gradient_weights, random_scores
from tests.algorithm.rows import response, settings

RESPONSES = [response(5), response(4, group=1, image=False), response(3, group=2)]
MASK = length_mask([5, 4, 3])
DEPENDENCY = torch.tensor([[5.0, 4, 3, 2, 1], [0, 0, 0, 0, 9], [1, 2, 3, 9, 9]])
ENTROPY = torch.tensor([[1.0, 2, 3, 4, 5], [4, 3, 2, 1, 9], [3, 2, 1, 9, 9]])


def weights(**changes: object) -> list[list[float]]:
    found = gradient_weights(RESPONSES, DEPENDENCY, ENTROPY, MASK, settings=settings(**changes))
    return found.tolist()


def test_each_kind_of_score() -> None:
    """40 % of 5, 4 and 3 tokens are 2 each. The second row has no image."""
    assert weights() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]
    assert weights(token_scores="entropy") == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    either = weights(token_scores="dependency_or_entropy")
    assert either == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert weights(text_only_rows="rank")[1] == [1, 1, 0, 0, 0]
    assert weights(text_only_rows="rank", token_scores="entropy")[1] == [1, 1, 0, 0, 0]
    assert weights(use_vppo_on_perception=False) == MASK.tolist()


def test_soft_and_pgpo_weights_are_those_of_the_scores() -> None:
    soft = sigmoid_weights(DEPENDENCY, MASK, mean=0.4)
    assert weights(token_weighting="soft") == [soft[0].tolist(), MASK[1].tolist(), soft[2].tolist()]
    pgpo = pgpo_weights(ENTROPY, MASK, tau=0.3, beta=1.0)
    assert weights(token_weighting="pgpo", token_scores="entropy", pgpo_tau=0.3, pgpo_beta=1.0) == [
        pgpo[0].tolist(), MASK[1].tolist(), pgpo[2].tolist()
    ]  # fmt: skip


def test_random_tokens_are_as_many_and_follow_from_the_response() -> None:
    found = weights(token_scores="random")
    assert [sum(row) for row in found] == [2, 4, 2]
    score_BT = random_scores(RESPONSES, width=7)
    assert torch.equal(score_BT[1:2, :4], random_scores(RESPONSES[1:2], width=4)), "whatever it lies beside"
    long = [replace(response(1000), sample=sample) for sample in range(2)]
    score_BT = random_scores(long, width=1000)
    assert not torch.equal(score_BT[0], score_BT[1])
    assert score_BT.mean().item() == pytest.approx(0.5, abs=0.03), "deviation 0.0065 of a mean of 2,000"


def test_the_perturbed_view_is_only_needed_if_something_reads_it() -> None:
    assert settings(token_scores="entropy").needs_dependency, "by shaping"
    unshaped = {"use_advantage_shaping": False}
    assert not settings(token_scores="entropy", **unshaped).needs_dependency
    assert not settings(token_scores="random", **unshaped).needs_dependency
    assert settings(token_scores="dependency_or_entropy", **unshaped).needs_dependency
