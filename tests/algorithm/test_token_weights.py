"""The weights of tokens in the loss, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vppo.algorithm.token_filter import kept_counts
from megatron_vppo.algorithm.token_weights import entropy_penalty_weight, policy_gradient_weight, rollout_correction
from megatron_vppo.config.choices import CorrectionKind, LossAverage

KEPT = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0, 0, 0]])

TOKENS = torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("denominator", "average", "first_row", "second_row"),
    [
        ("all", "token", 1 / 6, 1 / 6),
        ("selected", "token", 1 / 3, 1 / 3),
        ("all", "seq", 1 / 2 / 4, 1 / 2 / 2),
        ("selected", "seq", 1 / 2 / 1, 1 / 2 / 2),
        ("all", "fixed_length", 1 / 2 / 5, 1 / 2 / 5),
    ],
)
def test_policy_gradient_weight(denominator: str, average: str, first_row: float, second_row: float) -> None:
    """Two responses with tokens (the third is empty or left out): 1 of 4 and 2 of 2 tokens kept."""
    weight_BT = policy_gradient_weight(KEPT, TOKENS, denominator=denominator, average=average, fixed_length=5)
    expected_BT = KEPT * torch.tensor([[first_row], [second_row], [0.0]])
    torch.testing.assert_close(weight_BT, expected_BT, rtol=1e-7, atol=0)


def test_kept_tokens_of_rows_left_out_carry_nothing() -> None:
    weight_BT = policy_gradient_weight(torch.ones(3, 4), TOKENS, denominator="selected", average="token")
    torch.testing.assert_close(weight_BT, TOKENS / 6)
    nothing_BT = torch.zeros(2, 3)
    for average in ("token", "seq"):
        weight_BT = policy_gradient_weight(torch.ones(2, 3), nothing_BT, denominator="all", average=average)
        assert torch.equal(weight_BT, nothing_BT)


@pytest.mark.parametrize("average", ["token", "seq"])
def test_a_minibatch_of_one_token(average: LossAverage) -> None:
    one_BT = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert torch.equal(policy_gradient_weight(one_BT, one_BT, denominator="all", average=average), one_BT)
    assert torch.equal(entropy_penalty_weight(one_BT, one_BT, coefficient=0.5, tokens="all"), 0.5 * one_BT)


def test_entropy_penalty_weight() -> None:
    everywhere = entropy_penalty_weight(KEPT, TOKENS, coefficient=0.06, tokens="all")
    torch.testing.assert_close(everywhere, TOKENS * 0.01)
    kept = entropy_penalty_weight(KEPT, TOKENS, coefficient=0.06, tokens="selected")
    torch.testing.assert_close(kept, KEPT * 0.02)
    assert not entropy_penalty_weight(KEPT, torch.zeros(3, 4), coefficient=0.06, tokens="all").any()


def test_entropy_of_kept_tokens_in_rows_left_out_is_not_penalised() -> None:
    """The first row is left out: of three kept tokens two remain, and share the coefficient."""
    trained_BT = TOKENS * torch.tensor([[0.0], [1.0], [1.0]])
    weight_BT = entropy_penalty_weight(KEPT, trained_BT, coefficient=0.06, tokens="selected")
    torch.testing.assert_close(weight_BT, torch.tensor([[0.0] * 4, [0.03, 0.03, 0, 0], [0.0] * 4]))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="loss_denominator is 'none'"):
        policy_gradient_weight(KEPT, TOKENS, denominator="none", average="token")
    with pytest.raises(ValueError, match="loss_avg_mode is 'row'"):
        policy_gradient_weight(KEPT, TOKENS, denominator="all", average="row")
    with pytest.raises(ValueError, match="entropy_tokens is 'none'"):
        entropy_penalty_weight(KEPT, TOKENS, coefficient=0.1, tokens="none")
    for fraction in (0.0, 1.1):
        with pytest.raises(ValueError, match="keep_fraction"):
            kept_counts(torch.tensor([5]), keep_fraction=fraction, integer_ceil=True)


def test_rollout_correction() -> None:
    old_BT = torch.tensor([0.5, 1.0, 4.0, 1.0]).log()[None]
    weight_BT = rollout_correction(old_BT, torch.zeros(1, 4), torch.tensor([[1.0, 1, 1, 0]]), cap=2.0, kind="token")
    assert weight_BT.tolist()[0] == pytest.approx([0.5, 1.0, 2.0, 0.0])
    below_one_BT = rollout_correction(old_BT, torch.zeros(1, 4), torch.ones(1, 4), cap=0.75, kind="token")
    assert below_one_BT.tolist()[0] == pytest.approx([0.5, 0.75, 0.75, 0.75])
    far_BT = rollout_correction(torch.tensor([[25.0]]), torch.zeros(1, 1), torch.ones(1, 1), cap=1e30, kind="token")
    assert far_BT.item() == pytest.approx(math.exp(20), rel=1e-6), "beyond 20 nats the ratio no longer grows"
    with pytest.raises(ValueError, match="rollout_correction_cap is 0"):
        rollout_correction(old_BT, old_BT, torch.ones(1, 4), cap=0.0, kind="token")


def test_corrections_of_whole_responses() -> None:
    """Ratios 2 and 1/4 (product 1/2, geometric mean 0.71), 2 and 2 (4, 2), and 3 alone."""
    old_BT = torch.tensor([[2.0, 0.25], [2.0, 2.0], [3.0, 7.0]]).log()
    mask_BT = torch.tensor([[1.0, 1], [1, 1], [1, 0]])

    def corrected(kind: CorrectionKind, cap: float) -> list[list[float]]:
        return rollout_correction(old_BT, torch.zeros(3, 2), mask_BT, cap=cap, kind=kind).tolist()

    assert corrected("sequence_mask", 3.5) == [pytest.approx([0.5, 0.5]), [0, 0], pytest.approx([3.0, 0])]
    assert corrected("geometric_mask", 1.5) == [[1, 1], [0, 0], [0, 0]]
    assert corrected("geometric_mask", 2.5) == [[1, 1], [1, 1], [0, 0]]
    assert corrected("geometric_mask", 1.4) == [[0, 0], [0, 0], [0, 0]], "0.71 is below 1 / 1.4"
    with pytest.raises(ValueError, match="rollout_correction is 'row'"):
        corrected("row", 2.0)  # type: ignore[arg-type]
