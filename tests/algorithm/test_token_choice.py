"""The tokens that carry policy gradient, by each kind of score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_vppo.algorithm.padding import length_mask
from megatron_vppo.algorithm.soft_weights import pgpo_weights, sigmoid_weights
from megatron_vppo.algorithm.token_choice import gradient_weights, random_scores
from megatron_vppo.algorithm.types import Scores
from megatron_vppo.algorithm.vepo import vepo_scores
from megatron_vppo.algorithm.vgpo import vgpo_token_weights, visual_accumulation
from tests.algorithm.rows import response, settings

RESPONSES = [response(5), response(4, group=1, image=False), response(3, group=2)]
MASK = length_mask([5, 4, 3])
DEPENDENCY = torch.tensor([[5.0, 4, 3, 2, 1], [0, 0, 0, 0, 9], [1, 2, 3, 9, 9]])
ENTROPY = torch.tensor([[1.0, 2, 3, 4, 5], [4, 3, 2, 1, 9], [3, 2, 1, 9, 9]])
PERTURBED_ENTROPY = torch.tensor([[3.0, 2, 3, 4, 5], [0, 0, 0, 0, 0], [4, 2, 4, 9, 9]])


def weights(**changes: object) -> list[list[float]]:
    scores = Scores(MASK, ENTROPY, None, None, perturbed_entropy_BT=PERTURBED_ENTROPY)
    found = gradient_weights(RESPONSES, DEPENDENCY, scores, MASK, settings=settings(**changes))
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


def test_the_tokens_of_vepo_are_those_of_its_scores() -> None:
    """A row without an image has a divergence of zero, and the entropy of one view, so that all its scores are zero."""
    score_BT = vepo_scores(DEPENDENCY, ENTROPY, PERTURBED_ENTROPY, MASK, alpha=0.6)
    vepo = {"token_scores": "vepo", "vepo_alpha": 0.6, "dependency": "jsd", "top_p_perception_tokens": 0.2}
    assert score_BT[0].argmax() == 2 and score_BT[2].argmax() == 1
    assert weights(**vepo) == [[0, 0, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    soft = weights(**{**vepo, "token_weighting": "soft"})
    assert soft[0] == sigmoid_weights(score_BT, MASK, mean=0.2)[0].tolist()
    zero = DEPENDENCY * torch.tensor([[1.0], [0.0], [1.0]])
    scores = Scores(MASK, ENTROPY, None, None, perturbed_entropy_BT=PERTURBED_ENTROPY)
    as_ranked = settings(text_only_rows="rank", token_weighting="soft", **vepo)
    ranked = gradient_weights(RESPONSES, zero, scores, MASK, settings=as_ranked)
    assert ranked[1].tolist() == pytest.approx([0.2] * 4 + [0])
    with pytest.raises(ValueError, match="needs perturbed_entropy_BT"):
        gradient_weights(RESPONSES, DEPENDENCY, Scores(MASK, ENTROPY, None, None), MASK, settings=settings(**vepo))


def test_soft_and_pgpo_weights_are_those_of_the_scores() -> None:
    soft = sigmoid_weights(DEPENDENCY, MASK, mean=0.4)
    assert weights(token_weighting="soft") == [soft[0].tolist(), MASK[1].tolist(), soft[2].tolist()]
    pgpo = pgpo_weights(ENTROPY, MASK, tau=0.3, beta=1.0)
    assert weights(token_weighting="pgpo", token_scores="entropy", pgpo_tau=0.3, pgpo_beta=1.0) == [
        pgpo[0].tolist(), MASK[1].tolist(), pgpo[2].tolist()
    ]  # fmt: skip
    accumulation = visual_accumulation(DEPENDENCY, MASK, strength=0.4, tail=0.6, top=0.5)
    vgpo = vgpo_token_weights(accumulation, MASK)
    assert weights(token_weighting="vgpo", vgpo_strength=0.4, vgpo_tail=0.6, vgpo_top=0.5) == [
        vgpo[0].tolist(), MASK[1].tolist(), vgpo[2].tolist()
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
    assert settings(token_scores="vepo", dependency="jsd", **unshaped).needs_perturbed_view
    assert settings(dependency="visual_focus").needs_dependency, "from the original view alone"
    assert not settings(dependency="visual_focus").needs_perturbed_view
